"""Rows that a model in the gate, the champion or an ancestor of theirs was trained on: they cannot judge it.

In: a job, the champion. Out: row_ids, streamed from the packed artifacts that the store still has.
"""

from collections.abc import Callable, Iterator

from sft_core.lineage import trained_row_ids
from sft_core.store import Store
from sft_core.terminal import say
from tasks.ancestry import ancestors, ancestors_of
from tasks.registry import RegisteredVersion
from tasks.run_step import Job

PACKED = "sft.pack"


def rows_known_to_judged(
    job: Job, champion: RegisteredVersion | None, on_line: Callable[[str], None] = say
) -> Iterator[str]:
    """row_ids, with repeats. A model whose base is an earlier version's merged model knows that one's rows too."""
    store = Store(job.recipe.store)
    judged = [("the tuned model", job.plan["pack"].fingerprint)]
    versions = list(ancestors(job.recipe.base_model.path, job.plan["train"].inputs["base_model"]))
    if champion is not None:
        versions += [(job.recipe.model_name, champion), *ancestors_of(champion)]
    judged += [(f"{name} version {version.number}", version.tags.get(PACKED, "")) for name, version in versions]
    for name, fingerprint in dict(judged).items():
        rows = trained_row_ids(store, fingerprint) if fingerprint else None
        if rows is None:
            on_line(f"register: the packed rows of {name} are not in {store.url}; none of them is left out for it")
        else:
            yield from rows
