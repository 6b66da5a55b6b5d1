"""What a rehearsal changes in a recipe, beside its base model and its rows; everything else stays.

In: a recipe. Out: values to put over it, and what to say about them.
"""

import json
from pathlib import Path
from typing import Any

from sft_core.recipe import Recipe, TrainConfig
from sft_core.train.zero import PRESETS, deepspeed_config

STEPS, MICRO_BATCHES = 3, 2
GENERATED_ROWS, NEW_TOKENS = 4, 16
HELD_OUT_FRACTION, HELD_OUT_ROWS = 0.1, 5


def changed_sections(recipe: Recipe, scratch: Path, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Overrides for `rows` sampled rows, and a line on each change that a person should know of."""
    train, notes = _train(recipe.train, scratch)
    changes: dict[str, Any] = {"store": str(scratch / "store"), "train": train, "evaluate": _evaluate(recipe)}
    if recipe.eval_fraction:
        wanted = min(0.5, max(HELD_OUT_FRACTION, HELD_OUT_ROWS / max(rows, 1)))
        changes["eval_fraction"] = max(recipe.eval_fraction, wanted)
        if changes["eval_fraction"] > recipe.eval_fraction:
            notes.append(f"eval_fraction: {recipe.eval_fraction:g} -> {changes['eval_fraction']:g}, of few rows")
    deployed = {key: getattr(recipe.compute, key) for key in ("prepare", "train", "publish", "dask")}
    changes["register"] = {"by_reference": False, "min_heldout_rows": 1}  # a folder as store, few rows, no promotion
    changes["compute"] = {**dict.fromkeys(deployed), "num_proc": 1}
    named = [f"{value} ({key})" for key, value in deployed.items() if value]
    if named:
        notes.append(f"compute: all in this process, not on {', '.join(named)}")
    if recipe.evaluate.harness_tasks:
        notes.append(f"evaluate.harness_tasks: {', '.join(recipe.evaluate.harness_tasks)} are left out")
    return changes, notes


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    section = recipe.evaluate
    return {
        "max_new_tokens": min(section.max_new_tokens, NEW_TOKENS),
        "max_generated_rows": min(section.max_generated_rows, GENERATED_ROWS),
        "harness_tasks": [],
    }


def _train(train: TrainConfig, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    steps = min(train.max_steps or STEPS, STEPS)
    micro_batches = min(train.gradient_accumulation_steps, MICRO_BATCHES)
    batch = min(train.rows_at_once, MICRO_BATCHES)
    values: dict[str, Any] = {
        "max_steps": steps,
        "gradient_accumulation_steps": micro_batches,
        "per_device_train_batch_size": batch,
        "save_steps": steps,
        "logging_steps": 1,
        "num_processes": 1,
    }
    notes = [
        f"train: {steps} optimizer steps of {batch * micro_batches} packed rows, not "
        f"{train.rows_at_once * train.gradient_accumulation_steps} a rank, one rank"
    ]
    if train.dtype == "float16":
        values["dtype"] = "bfloat16"
        notes.append("train.dtype: float16 -> bfloat16, which a CPU has")
    if train.lora is not None and train.lora.init_lora_weights not in (True, False, "gaussian"):
        values["lora"] = {"init_lora_weights": True}
        notes.append(
            f"train.lora.init_lora_weights: {train.lora.init_lora_weights} -> true; the tiny layers may have fewer "
            "directions than r"
        )
    if train.sequence_parallel_size > 1:
        values["sequence_parallel_size"] = 1
        notes.append(f"train.sequence_parallel_size: {train.sequence_parallel_size} -> 1, one rank")
    if train.deepspeed is not None and train.deepspeed not in PRESETS:
        values["deepspeed"] = _with_auto(train, values, scratch)
        notes.append(f"train.deepspeed: a copy of {train.deepspeed} with batch sizes and dtype of the rehearsal")
    return values, notes


def _with_auto(train: TrainConfig, values: dict[str, Any], scratch: Path) -> str:
    """A copy of the recipe's JSON (checked against the recipe first) in which the changed keys say what fits."""
    config = deepspeed_config(train)
    assert config is not None, "the recipe names a file"
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config.update({key: "auto" for key in sizes if key in config})
    dtype = values.get("dtype", train.dtype)
    for section, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        if section in config or dtype == name:
            config[section] = {**(config.get(section) or {}), "enabled": dtype == name}
    copy = scratch / "deepspeed.json"
    copy.write_text(json.dumps(config, indent=1), "utf-8")
    return str(copy)
