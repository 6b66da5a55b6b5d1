"""Where the work on shards runs: in this process, in several of this machine, or on a Dask cluster.

In: the recipe's `compute`. Out: a `Mapper` (`sft_core.shards`). On Dask, a Prefect task works on a few shards at a time
through prefect-dask's task runner; their files travel with it, so the cluster needs no disk in common, only this
project and, for a map_fn of your own, its module.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from sft_core.errors import RecipeError
from sft_core.own_packages import hold_names
from sft_core.parcels import Parcel, pack_parcel, unpacked
from sft_core.processes import default_processes, process_mapper
from sft_core.recipe.sections import ComputeConfig
from sft_core.shards import Made, Mapper
from tasks.retries import retry_unless_users_fault

SHARDS_A_TASK = 8
TASKS_AHEAD = 32
"""Tasks handed to the cluster at a time; their files are in memory."""


@contextmanager
def shard_mapper(compute: ComputeConfig) -> Iterator[Mapper]:
    """The mapper that `compute` asks for."""
    if compute.dask is not None:
        yield _DaskMapper(compute.dask)
    else:
        with process_mapper(compute.num_proc or default_processes()) as mapper:
            yield mapper


@task(
    name="make-shards",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=retry_unless_users_fault,
)
def make_shards(work: Callable[[Any], Made], parcel: Parcel) -> list[Made]:
    """Work on a few shards, on a Dask worker."""
    with unpacked(parcel) as arguments:
        return [work(argument) for argument in arguments]


class _DaskMapper:
    """Chunks of shards as Prefect tasks on the cluster at `address`; results in order."""

    def __init__(self, address: str) -> None:
        if importlib.util.find_spec("prefect_dask") is None:
            raise RecipeError(f"compute.dask is {address!r}, and prefect-dask is not installed: sft-flows[dask]")
        self._address = address

    def __call__(self, work: Callable[[Any], Made], arguments: Sequence[Any]) -> Iterable[Made]:
        if not arguments:
            return
        from prefect_dask import DaskTaskRunner  # optional

        with DaskTaskRunner(address=self._address) as runner:
            runner.client.run_on_scheduler(hold_names)  # it unpickles tasks too
            runner.client.register_worker_callbacks(hold_names)  # also of workers that join later
            ahead: deque[Any] = deque()
            for start in range(0, len(arguments), SHARDS_A_TASK):
                if len(ahead) == TASKS_AHEAD:
                    yield from ahead.popleft().result()
                parcel = pack_parcel(arguments[start : start + SHARDS_A_TASK])
                ahead.append(runner.submit(make_shards, {"work": work, "parcel": parcel}))
            for future in ahead:
                yield from future.result()
