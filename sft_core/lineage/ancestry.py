"""The chain of a model: reports and merged model <- adapter <- checkpoint <- packed <- conversations <- raw rows.

In: what a retraining recorded. Out: `Link`s, each found by the fingerprint that the link before names as its input. A
manifest's fingerprint is computed anew from its parts and inputs, so an altered record shows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft_core.artifacts import KIND_OF_STEP, Manifest
from sft_core.fingerprint import hash_value

STEP_OF_INPUT = {
    "adapter": "convert",
    "checkpoint": "train",
    "packed": "pack",
    "conversations": "normalize",
    "model": "merge",
    "raw": "fetch",
}
"""Step that wrote an input, by the first word of the input's name; `base_model` comes from outside."""
BASE_MODEL = "base_model"


@dataclass(frozen=True, slots=True)
class Recorded:
    """One retraining: its resolved recipe, its plan, the manifests of its steps by key (`normalize`, `fetch/0`)."""

    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    manifests: Mapping[str, Manifest]
    commit: str = ""
    """The project's, where the run knew it."""

    def scores(self, which: str) -> dict[str, float]:
        """Metrics of `tuned`, `base` or `champion`; empty if that was not recorded."""
        manifest = self.manifests.get(f"evaluate/{which}")
        return dict(manifest.facts.get("metrics", {})) if manifest is not None else {}


@dataclass(frozen=True, slots=True)
class Link:
    """One artifact of the chain. Without a manifest it was named as an input, and never recorded."""

    step: str
    fingerprint: str
    key: str
    manifest: Manifest | None

    @property
    def kind(self) -> str:
        """What the step writes."""
        return KIND_OF_STEP.get(self.step, "BaseModel")

    @property
    def sound(self) -> bool:
        """Whether the fingerprint is that of the recorded parts and inputs. A base model has its own kind of hash."""
        if self.step == BASE_MODEL:
            return True
        if self.manifest is None:
            return False
        parts = {"step": self.manifest.step, **self.manifest.parts, "inputs": self.manifest.inputs}
        return hash_value(parts) == self.fingerprint


def walk_ancestry(manifests: Mapping[str, Manifest], merged_fingerprint: str) -> tuple[Link, ...]:
    """From the reports on the merged model back to the raw rows; the base model last."""
    by_fingerprint = {manifest.fingerprint: (key, manifest) for key, manifest in manifests.items()}
    links: dict[str, Link] = {}

    def visit(step: str, fingerprint: str) -> None:
        if fingerprint in links:
            return
        key, manifest = by_fingerprint.get(fingerprint, ("", None))
        links[fingerprint] = Link(step, fingerprint, key, manifest)
        for name, source in manifest.inputs.items() if manifest is not None else ():
            first = name.partition("/")[0]
            visit(BASE_MODEL if first == BASE_MODEL else STEP_OF_INPUT[first], source)

    for key in _reports(manifests, merged_fingerprint):
        links[manifests[key].fingerprint] = Link("evaluate", manifests[key].fingerprint, key, manifests[key])
    visit("merge", merged_fingerprint)
    order = ["evaluate", *reversed([step for step in KIND_OF_STEP if step != "evaluate"]), BASE_MODEL]
    return tuple(sorted(links.values(), key=lambda link: order.index(link.step)))


def _reports(manifests: Mapping[str, Manifest], merged_fingerprint: str) -> Iterator[str]:
    """Keys of the reports that the verdict rests on: on this model, and on those it was compared with."""
    tuned = manifests.get("evaluate/tuned")
    if tuned is not None and tuned.inputs.get("model") == merged_fingerprint:
        yield from (key for key in ("evaluate/tuned", "evaluate/base", "evaluate/champion") if key in manifests)
