"""Rows that a model in the gate, the champion or an ancestor of theirs was trained on: they cannot judge it.

In: a job, the champion. Out: row_ids, streamed from the packed artifacts that the store still has.
"""

from collections.abc import Callable, Iterator
from pathlib import PurePath

from sft_core.lineage import trained_row_ids
from sft_core.store import Store
from tasks.registry import RegisteredVersion, find_version
from tasks.run_step import Job

PACKED, BASE_MODEL = "sft.pack", "sft.base_model"
FINGERPRINT_DIGITS = 64


def rows_known_to_judged(
    job: Job, champion: RegisteredVersion | None, on_line: Callable[[str], None] = print
) -> Iterator[str]:
    """row_ids, with repeats. A model whose base is an earlier version's merged model knows that one's rows too."""
    store = Store(job.recipe.store)
    judged = [("the tuned model", job.plan["pack"].fingerprint)]
    ancestors = list(_ancestors(job.recipe.model_name, job.recipe.base_model.path))
    if champion is not None:
        ancestors += [champion, *_ancestors(job.recipe.model_name, champion.tags.get(BASE_MODEL, ""))]
    judged += [(f"version {version.number}", version.tags.get(PACKED, "")) for version in ancestors]
    for name, fingerprint in dict(judged).items():
        rows = trained_row_ids(store, fingerprint) if fingerprint else None
        if rows is None:
            on_line(f"register: the packed rows of {name} are not in {store.url}; none of them is left out for it")
        else:
            yield from rows


def _ancestors(model_name: str, base_model: str) -> Iterator[RegisteredVersion]:
    """Versions that a base model's path leads back to: `<store>/merge/<fingerprint>`."""
    seen: set[str] = set()
    while len(name := PurePath(base_model).name) == FINGERPRINT_DIGITS and name not in seen:
        seen.add(name)
        version = find_version(model_name, name)
        if version is None:
            return
        yield version
        base_model = version.tags.get(BASE_MODEL, "")
