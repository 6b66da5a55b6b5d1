"""What all step tasks share: run one planned step through the store, record it, say whether it was reused.

A task returns a plain dict, the artifact reference. A reused one ends in a state named `Reused`, which the UI shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from sft_core.artifacts import Manifest
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.shards import Mapper
from sft_core.steps import Built, Retraining, run_step
from sft_core.store import Store
from tasks.retries import retry_unless_users_fault
from tasks.shard_mapping import shard_mapper
from tasks.tracking import PartRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every task of one part gets: the resolved recipe, its plan, the MLflow run of the part."""

    recipe: Recipe
    plan: Plan
    part: PartRun

    def retraining(
        self, on_line: Callable[[str], None], champion: Path | None = None, mapper: Mapper = map
    ) -> Retraining:
        """The core's view of it."""
        return Retraining(self.recipe, self.plan, Store(self.recipe.store), on_line, champion, mapper)

    def manifest(self, key: str) -> Manifest | None:
        """Of the artifact of `key`; None where the store does not have it."""
        return Store(self.recipe.store).find(self.plan[key].step, self.plan[key].fingerprint)


STEP: dict[str, Any] = {
    "cache_policy": NO_CACHE,  # reuse is the store's business
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": retry_unless_users_fault,
}
"""Options of every step's task but train's, whose retries come from its checkpoints."""


def perform(job: Job, key: str, champion: Path | None = None) -> Any:
    """Run the step, record it in MLflow, log one line; the reference, as data of a `Reused` state if it was there."""
    logger = get_run_logger()
    with shard_mapper(job.recipe.compute) as mapper:
        built = run_step(job.retraining(logger.info, champion, mapper), key)
    job.part.record(key, built)
    return finish(key, built)


def finish(key: str, built: Built) -> Any:
    """The task's return value for a built or reused artifact."""
    reference = built.artifact.as_dict()
    if built.reused:
        get_run_logger().info("%s: reused %s", key, built.artifact.fingerprint[:12])
        return Completed(name="Reused", message=f"built {built.manifest.started[:19]}Z", data=reference)
    get_run_logger().info("%s: %s in %.1f s", key, built.artifact.fingerprint[:12], built.manifest.took_seconds)
    return reference


def call(task: Any, *arguments: Any, **options: Any) -> Any:
    """Call a task directly and give its value, whether its state is Completed or Reused."""
    return task(*arguments, return_state=True, **options).result()
