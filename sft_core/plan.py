"""The plan: what every step will write, named before anything runs (DESIGN 3).

In: a resolved recipe. Out: one `PlannedStep` a step, with the parts its fingerprint is made of. Made once, by the
parent; it travels beside the recipe, so a CPU parent and a GPU worker name the same artifacts.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Self

from sft_core import convert, evaluate, fetch, merge, normalize, pack, train
from sft_core.base_check import check_base
from sft_core.base_model import BaseModelDescription, describe_base_model, local_base_model
from sft_core.fetch import describe_source
from sft_core.fingerprint import hash_text, hash_value
from sft_core.normalize import map_fn_source
from sft_core.pack import template_of
from sft_core.recipe import Recipe
from sft_core.train.limits import check_training
from sft_core.train.zero import deepspeed_part

TRAIN_KEYS_WITHOUT_EFFECT = {
    *("logging_steps", "save_steps", "save_total_limit", "num_processes"),
    *("sample_prompts", "sample_max_new_tokens"),
}
"""Keys of `train` that change how a run is watched or kept, not what it learns; `eval_steps` too, unless the held-out
loss decides what comes out."""


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
    base = describe_base_model(recipe.base_model)
    is_folder = base.commit is None  # its bytes are read in any case
    notes = check_base(recipe.base_model, base.commit, numbers=is_folder)
    template = _chat_template(recipe, base)
    steps: dict[str, PlannedStep] = {}

    def add(key: str, parts: dict[str, Any], inputs: dict[str, str]) -> str:
        whole = {**parts, "inputs": inputs}
        steps[key] = PlannedStep(key, hash_value({"step": key.partition("/")[0], **whole}), parts, inputs)
        return steps[key].fingerprint

    sources = (*recipe.datasets, *recipe.eval_datasets)
    raw = {
        f"raw/{i}": add(f"fetch/{i}", {"source": describe_source(s).parts, "version": fetch.STEP_VERSION}, {})
        for i, s in enumerate(sources)
    }
    conversations = add("normalize", _normalize_parts(recipe), raw)
    packed = add("pack", _pack_parts(recipe, base, template), {"conversations": conversations})
    checkpoint = add("train", _train_parts(recipe), {"packed": packed, "base_model": base.fingerprint})
    merged = _add_model(add, recipe, base, checkpoint, conversations)
    for name, model in (("tuned", merged), ("base", base.fingerprint)):
        add(f"evaluate/{name}", evaluate_parts(recipe, template), {"model": model, "conversations": conversations})
    return Plan(steps, template, base.commit, notes)


def _add_model(
    add: Callable[[str, dict[str, Any], dict[str, str]], str],
    recipe: Recipe,
    base: BaseModelDescription,
    checkpoint: str,
    conversations: str,
) -> str:
    """convert and merge. Where all weights were trained there is nothing to merge: merge converts the checkpoint."""
    parts: dict[str, Any] = {"dtype": recipe.train.dtype, "version": merge.STEP_VERSION}
    if recipe.train.lora is None:
        parts["convert"] = convert.STEP_VERSION
        return add("merge", parts, {"checkpoint": checkpoint, "base_model": base.fingerprint})
    adapter = add("convert", {"version": convert.STEP_VERSION}, {"checkpoint": checkpoint})
    parts |= {"merge": recipe.merge.model_dump(mode="json"), "quantization": recipe.train.quantization}
    return add("merge", parts, {"adapter": adapter, "base_model": base.fingerprint, "conversations": conversations})


def plan_champion(plan: Plan, recipe: Recipe, model_fingerprint: str) -> Plan:
    """The plan with one step more: the present champion, scored on this run's held-out rows by its own template."""
    inputs = {"model": model_fingerprint, "conversations": plan["normalize"].fingerprint}
    parts = evaluate_parts(recipe, None)
    if model_fingerprint == plan["merge"].fingerprint:
        parts = plan["evaluate/tuned"].parts
    step = PlannedStep("evaluate/champion", hash_value({"step": "evaluate", **parts, "inputs": inputs}), parts, inputs)
    return replace(plan, steps={**plan.steps, step.key: step})


def library_versions() -> dict[str, str]:
    """Recorded in manifests, not in addresses."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "tokenizers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def evaluate_parts(recipe: Recipe, template: str | None) -> dict[str, Any]:
    """What decides an evaluation beside its inputs; the primary metric does not."""
    without = {"primary_metric", "batch_size", "scorer", "harness_tasks"}
    section = recipe.evaluate.model_dump(mode="json", exclude=without)
    chat_template = hash_text(template) if template is not None else "the model's own"
    return {
        "evaluate": section,
        "scorer": evaluate.scorer_source(recipe.evaluate.scorer),
        "harness": evaluate.harness_parts(recipe.evaluate.harness_tasks),
        "max_length": recipe.pack.max_length,
        "seed": recipe.seed,
        "chat_template": chat_template,
        "version": evaluate.STEP_VERSION,
    }


def _normalize_parts(recipe: Recipe) -> dict[str, Any]:
    sources = [(d, False) for d in recipe.datasets] + [(d, True) for d in recipe.eval_datasets]
    return {
        "sources": [
            {"map_fn": map_fn_source(d.map_fn), "weight": d.weight, "held_out": held_out} for d, held_out in sources
        ],
        "eval_fraction": recipe.eval_fraction,
        "normalize": recipe.normalize.model_dump(mode="json"),
        "seed": recipe.seed,
        "version": normalize.STEP_VERSION,
    }


def _pack_parts(recipe: Recipe, base: BaseModelDescription, template: str) -> dict[str, Any]:
    return {
        "pack": recipe.pack.model_dump(
            mode="json", exclude={"chat_template", "template_kwargs", "reasoning", "train_on"}
        ),
        "seed": recipe.seed,
        "tokenizer": base.tokenizer_fingerprint,
        "chat_template": hash_text(template),
        "tokenizers": version("tokenizers"),
        "version": pack.STEP_VERSION,
    }


def _train_parts(recipe: Recipe) -> dict[str, Any]:
    unheeded = set() if recipe.train.heeds_held_out_loss else {"eval_steps"}
    section = recipe.train.model_dump(mode="json", exclude=TRAIN_KEYS_WITHOUT_EFFECT | unheeded)
    section["deepspeed"] = deepspeed_part(recipe.train)
    return {"train": section, "seed": recipe.seed, "version": train.STEP_VERSION}


def _chat_template(recipe: Recipe, base: BaseModelDescription) -> str:
    if recipe.pack.chat_template is not None:
        return template_of(recipe.pack)
    from transformers import AutoTokenizer  # slow to import

    folder = local_base_model(recipe.base_model, base.commit)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.base_model.trust_remote_code)
    return template_of(recipe.pack, tokenizer)
