"""Run a recorded retraining again, elsewhere, and compare every file that a later step reads.

In: what was recorded, an empty store, the store of the first time. Out: one `Compared` a step, in order; the caller
stops at the first that differs. Raw rows are fetched again; where the source has changed since, they are taken from
the first store.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.artifacts import Manifest
from sft_core.errors import PlanError, SourceError
from sft_core.explain import differences
from sft_core.lineage.ancestry import Recorded
from sft_core.plan import Plan
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from sft_core.terminal import say
from sft_core.trust import require_remote_code

ABOUT_THE_RUN = (
    "metrics.jsonl",
    "train.log",
    "checkpoint/README.md",
    "checkpoint/adapter_config.json",
    "checkpoint/complete",
    "checkpoint/trainer_state.json",
    "checkpoint/training_args.bin",
)
"""Files of train that hold times, places, or names in no order; the model is in the others."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One step: files compared, and in words what differs; `note`: where its content came from, if not from work."""

    key: str
    files: int
    different: tuple[str, ...]
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether every file came out the same, bit for bit."""
        return not self.different


def reproduce(
    recorded: Recorded, store: Store, first_store: Store, on_line: Callable[[str], None] = say
) -> Iterator[Compared]:
    """Build step by step into `store`, and compare each with its recorded manifest."""
    recipe = resolve({**recorded.recipe, "store": store.url})
    if recipe.base_model.trust_remote_code:
        require_remote_code("the recorded recipe sets base_model.trust_remote_code")
    plan = Plan.from_dict(recorded.plan)
    run = Retraining(recipe, plan, store, on_line)
    for key in plan.steps:
        note = ""
        try:
            manifest = run_step(run, key).manifest
        except (PlanError, SourceError) as error:
            taken = _take(run, first_store, key)
            if taken is None:
                raise
            manifest, note = taken, f"from the store: {error}"
        before = recorded.manifests.get(key)
        different = ("no manifest was recorded",) if before is None else compare_manifests(before, manifest)
        yield Compared(key, len(manifest.files), different, note)


def compare_manifests(before: Manifest, after: Manifest) -> tuple[str, ...]:
    """Files that differ by SHA-256; where there are any, also what else was different: libraries, device."""
    names = sorted({*before.files, *after.files} - set(ABOUT_THE_RUN))
    found = [name for name in names if _sha256(before, name) != _sha256(after, name)]
    if not found:
        return ()
    return (*found, *differences(_surroundings(before), _surroundings(after)))


def _surroundings(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.versions, "device": manifest.device}


def _sha256(manifest: Manifest, name: str) -> str | None:
    entry = manifest.files.get(name)
    return entry.sha256 if entry is not None else None


def _take(run: Retraining, first_store: Store, key: str) -> Manifest | None:
    """Copy an artifact from the store of the first time."""
    step = run.plan[key]
    manifest = first_store.find(step.step, step.fingerprint)
    if manifest is None or step.step != "fetch":
        return None
    source = first_store.local(first_store.artifact(step.step, step.fingerprint))
    with run.store.staging(step.step) as out:
        for name in manifest.files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(source) / name, out / name)
        return run.store.publish(out, manifest)
