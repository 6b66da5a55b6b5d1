"""Why a step is reused or rebuilt: the plan's parts against those of the nearest artifact that the store has."""

from dataclasses import dataclass
from typing import Any

from sft_core.artifacts import Manifest
from sft_core.plan import Plan, PlannedStep
from sft_core.store import Store


@dataclass(frozen=True, slots=True)
class Explanation:
    """One step: reused or not, and why in words."""

    key: str
    fingerprint: str
    reused: bool
    why: str


def explain_plan(plan: Plan, store: Store, name: str) -> list[Explanation]:
    """One explanation a step, in order. `name` is the recipe's: its own earlier runs are compared with first."""
    return [_explain(step, store, name) for step in plan.steps.values()]


def _explain(step: PlannedStep, store: Store, name: str) -> Explanation:
    found = store.find(step.step, step.fingerprint)
    if found is not None:
        return Explanation(step.key, step.fingerprint, True, f"built {found.started[:19]}Z")
    if store.read_manifest(step.step, step.fingerprint) is not None:
        return Explanation(step.key, step.fingerprint, False, "its files are missing or torn")
    manifests = store.manifests(step.step)
    nearest = _nearest(step, [m for m in manifests if m.name == f"{name}:{step.key}"] or manifests)
    if nearest is None:
        return Explanation(step.key, step.fingerprint, False, "never built")
    changes = differences({**nearest.parts, "inputs": nearest.inputs}, {**step.parts, "inputs": step.inputs})
    return Explanation(step.key, step.fingerprint, False, "; ".join(changes) or "its content changed")


def _nearest(step: PlannedStep, manifests: list[Manifest]) -> Manifest | None:
    """The one with the fewest differences; of equals the newest."""
    planned = {**step.parts, "inputs": step.inputs}
    ranked = sorted(
        enumerate(manifests), key=lambda m: (len(differences({**m[1].parts, "inputs": m[1].inputs}, planned)), -m[0])
    )
    return ranked[0][1] if ranked else None


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Leaves that differ, in words.

    >>> differences({"train": {"learning_rate": 0.1}, "seed": 1}, {"train": {"learning_rate": 0.2}, "seed": 1})
    ['train.learning_rate: 0.1 -> 0.2']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}.{i}")]
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:10]
    return text if len(text) <= 60 else f"{text[:57]}..."
