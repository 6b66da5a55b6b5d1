"""The plan: what every step will write, named before anything runs (DESIGN 3).

In: a resolved recipe. Out: one `PlannedStep` a step, with the parts its fingerprint is made of. Made once, by the
parent; it travels beside the recipe, so a CPU parent and a GPU worker name the same artifacts.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from sft_core.base_check import check_base
from sft_core.fingerprint import hash_value
from sft_core.plan_parts import Readings, evaluate_parts, step_inputs, step_parts
from sft_core.recipe import Recipe
from sft_core.train.limits import check_training


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One artifact to be: `key` is `normalize`, `fetch/0`, `evaluate/base`; `parts` decides the fingerprint."""

    key: str
    fingerprint: str
    parts: dict[str, Any]
    inputs: dict[str, str]

    @property
    def step(self) -> str:
        """The step's word."""
        return self.key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of one retraining, in order. `chat_template` is the Jinja text, `base_commit` the hub commit if any,
    `notes` what a person should know of the base."""

    steps: dict[str, PlannedStep]
    chat_template: str
    base_commit: str | None
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> PlannedStep:
        return self.steps[key]

    @property
    def fingerprint(self) -> str:
        """Of the retraining as a whole: what it will register, judged by what."""
        return hash_value({key: self[key].fingerprint for key in ("merge", "evaluate/tuned", "evaluate/base")})

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, to travel as a flow parameter."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Back from `as_dict`."""
        steps = {key: PlannedStep(**entry) for key, entry in value["steps"].items()}
        return cls(steps, value["chat_template"], value["base_commit"], tuple(value["notes"]))


def plan_recipe(recipe: Recipe) -> Plan:
    """Name every artifact of `recipe`. Reads the sources' and the base model's bytes, and writes nothing. ModelError if
    the base is not whole."""
    check_training(recipe.train)
    found = Readings(recipe)
    is_folder = found.base.commit is None  # its bytes are read in any case
    notes = check_base(recipe.base_model, found.base.commit, numbers=is_folder)
    _check_adapter(recipe, found.base.commit)
    steps: dict[str, PlannedStep] = {}
    for key in _keys(recipe):
        before = {name: step.fingerprint for name, step in steps.items()}
        parts = step_parts(key, recipe, found, found.chat_template)
        steps[key] = name_step(key, parts, step_inputs(key, recipe, found, before))
    return Plan(steps, found.chat_template, found.base.commit, notes)


def _check_adapter(recipe: Recipe, commit: str | None) -> None:
    """Where the base is on this disk, and its architecture is no code of its own; else training tells."""
    if recipe.train.lora is None or recipe.base_model.trust_remote_code:
        return
    from sft_core.base_check.hub import cached_folder
    from sft_core.train.fit import check_adapter  # slow to import

    folder = Path(recipe.base_model.path)
    here = folder if folder.is_dir() else cached_folder(recipe.base_model, commit)
    if here is not None:
        check_adapter(here, recipe.train.lora)


def _keys(recipe: Recipe) -> list[str]:
    """Every step but the champion's evaluation, in order. Where all weights are trained there is nothing to merge:
    merge converts the checkpoint."""
    fetches = [f"fetch/{index}" for index in range(len(recipe.datasets) + len(recipe.eval_datasets))]
    convert_and_merge = ["convert", "merge"] if recipe.train.lora is not None else ["merge"]
    return [*fetches, "normalize", "pack", "train", *convert_and_merge, "evaluate/tuned", "evaluate/base"]


def name_step(key: str, parts: dict[str, Any], inputs: dict[str, str]) -> PlannedStep:
    """The step under its fingerprint."""
    return PlannedStep(key, hash_value({"step": key.partition("/")[0], **parts, "inputs": inputs}), parts, inputs)


def plan_champion(plan: Plan, recipe: Recipe, model_fingerprint: str) -> Plan:
    """The plan with one step more: the present champion, scored on this run's held-out rows by its own template."""
    inputs = {"model": model_fingerprint, "conversations": plan["normalize"].fingerprint}
    parts = evaluate_parts(recipe, None)
    if model_fingerprint == plan["merge"].fingerprint:
        parts = plan["evaluate/tuned"].parts
    step = name_step("evaluate/champion", parts, inputs)
    return replace(plan, steps={**plan.steps, step.key: step})


def library_versions() -> dict[str, str]:
    """Recorded in manifests, not in addresses."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "tokenizers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
