"""What decides each step's artifact: keys of the recipe, what the step reads, versions of code (DESIGN 3).

In: a resolved recipe, `Readings` of what lies outside of the store. Out: a step's parts and its inputs, JSON-able. The
plan is made of them; at use they are made again, and must be the same (`sft_core/as_planned.py`).
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

from sft_core import convert, evaluate, fetch, merge, normalize, pack, train
from sft_core.base_model import BaseModelDescription, describe_base_model, describe_tokenizer, local_base_model
from sft_core.fetch import SourceDescription, describe_source
from sft_core.fingerprint import hash_text
from sft_core.normalize import map_fn_source
from sft_core.pack import template_of
from sft_core.recipe import Recipe
from sft_core.train.zero import deepspeed_part

TRAIN_KEYS_WITHOUT_EFFECT = {
    *("logging_steps", "save_steps", "save_total_limit", "num_processes"),
    *("sample_prompts", "sample_max_new_tokens"),
    *("gradient_checkpointing", "fused_lora", "use_liger_kernel"),
}
"""Keys of `train` that change how a run is watched, kept or computed, not what it learns but for rounding: a run that
was out of memory goes on with `gradient_checkpointing`. `eval_steps` too, unless the held-out loss decides what comes
out."""


class Planned(Protocol):
    """What of a plan is read again at use."""

    @property
    def base_commit(self) -> str | None:
        """The base model's commit on the hub, if it is there."""
        ...

    @property
    def chat_template(self) -> str:
        """Jinja text."""
        ...


class Readings:
    """What steps read beside other steps' artifacts, as it is now: each is looked at when it is asked for, once.

    `planned` is given where a plan was made: a hub model is then the commit that was planned.
    """

    def __init__(self, recipe: Recipe, planned: Planned | None = None) -> None:
        self._recipe, self._planned = recipe, planned
        self._sources: dict[int, SourceDescription] = {}
        commit = planned.base_commit if planned is not None else None
        self._base_model = recipe.base_model.model_copy(update={"revision": commit} if commit else {})

    @cached_property
    def base(self) -> BaseModelDescription:
        """All of the base model."""
        return describe_base_model(self._base_model)

    @cached_property
    def tokenizer(self) -> str:
        """Fingerprint of the base model's tokenizer. Where that alone is asked for, no weight is read."""
        return self.base.tokenizer_fingerprint if self._planned is None else describe_tokenizer(self._base_model)

    @cached_property
    def chat_template(self) -> str:
        """Text of the template. A tokenizer's own is a part of the tokenizer: it is read when a plan is made."""
        if self._recipe.pack.chat_template is not None:
            return template_of(self._recipe.pack)
        return self._planned.chat_template if self._planned is not None else _own_template(self._recipe, self.base)

    def source(self, index: int) -> SourceDescription:
        """The data set of `fetch/<index>`."""
        if index not in self._sources:
            self._sources[index] = describe_source((*self._recipe.datasets, *self._recipe.eval_datasets)[index])
        return self._sources[index]


def step_parts(key: str, recipe: Recipe, found: Readings, template: str | None) -> dict[str, Any]:
    """What decides a step's content beside its inputs. `template` is what an evaluation renders with; None: the model's
    own."""
    step, _, which = key.partition("/")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "fetch": lambda: {"source": found.source(int(which)).parts, "version": fetch.STEP_VERSION},
        "normalize": lambda: _normalize_parts(recipe),
        "pack": lambda: _pack_parts(recipe, found),
        "train": lambda: _train_parts(recipe),
        "convert": lambda: {"version": convert.STEP_VERSION},
        "merge": lambda: _merge_parts(recipe),
        "evaluate": lambda: evaluate_parts(recipe, template),
    }
    return parts[step]()


def step_inputs(key: str, recipe: Recipe, found: Readings, before: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of what a step reads. `before`: those of the steps before it, by key."""

    def of(name: str) -> str:
        return found.base.fingerprint if name == "base" else before[name]

    full = recipe.train.lora is None
    inputs = {
        "normalize": {key.replace("fetch", "raw"): key for key in before if key.startswith("fetch/")},
        "pack": {"conversations": "normalize"},
        "train": {"packed": "pack", "base_model": "base"},
        "convert": {"checkpoint": "train"},
        "merge": {"checkpoint": "train", "base_model": "base"}
        if full
        else {"adapter": "convert", "base_model": "base", "conversations": "normalize"},
        "evaluate/tuned": {"model": "merge", "conversations": "normalize"},
        "evaluate/base": {"model": "base", "conversations": "normalize"},
    }
    return {word: of(name) for word, name in inputs.get(key, {}).items()}


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
        "max_quarantined_fraction": recipe.max_quarantined_fraction,
        "normalize": recipe.normalize.model_dump(mode="json"),
        "seed": recipe.seed,
        "version": normalize.STEP_VERSION,
    }


def _pack_parts(recipe: Recipe, found: Readings) -> dict[str, Any]:
    return {
        "pack": recipe.pack.model_dump(
            mode="json", exclude={"chat_template", "template_kwargs", "reasoning", "train_on"}
        ),
        "max_quarantined_fraction": recipe.max_quarantined_fraction,
        "seed": recipe.seed,
        "tokenizer": found.tokenizer,
        "chat_template": hash_text(found.chat_template),
        "tokenizers": version("tokenizers"),
        "version": pack.STEP_VERSION,
    }


def _train_parts(recipe: Recipe) -> dict[str, Any]:
    unheeded = set() if recipe.train.heeds_held_out_loss else {"eval_steps"}
    section = recipe.train.model_dump(mode="json", exclude=TRAIN_KEYS_WITHOUT_EFFECT | unheeded)
    section["deepspeed"] = deepspeed_part(recipe.train)
    return {"train": section, "seed": recipe.seed, "version": train.STEP_VERSION}


def _merge_parts(recipe: Recipe) -> dict[str, Any]:
    parts: dict[str, Any] = {"dtype": recipe.train.dtype, "version": merge.STEP_VERSION}
    if recipe.train.lora is None:
        return parts | {"convert": convert.STEP_VERSION}
    return parts | {"merge": recipe.merge.model_dump(mode="json"), "quantization": recipe.train.quantization}


def _own_template(recipe: Recipe, base: BaseModelDescription) -> str:
    from transformers import AutoTokenizer  # slow to import

    folder = local_base_model(recipe.base_model, base.commit)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.base_model.trust_remote_code)
    return template_of(recipe.pack, tokenizer)
