"""DeepSpeed's presets and files, and what is refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe import resolve
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.limits import check_training
from sft_core.train.zero import deepspeed_config, zero_stage
from tests.sft_core.train_runs import config

STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


@pytest.mark.parametrize("name", STAGES)
def test_a_preset_has_two_spellings_and_one_meaning(name: str) -> None:
    short, long = config(deepspeed=name), config(deepspeed=f"deepspeed_{name}")
    assert long == short  # so one address, too
    found = deepspeed_config(short)
    assert found is not None
    zero = found["zero_optimization"]
    assert zero_stage(found) == zero["stage"] == STAGES[name]
    offloaded = {key for key in zero if key.startswith("offload_")}
    assert offloaded == {
        "zero2_offload": {"offload_optimizer"},
        "zero3_offload": {"offload_optimizer", "offload_param"},
    }.get(name, set())


def test_deepspeed_is_a_preset_a_file_or_an_error(tmp_path: Path) -> None:
    own = write(tmp_path, {"zero_optimization": {"stage": 1}})
    assert deepspeed_config(config(deepspeed=own)) == {"zero_optimization": {"stage": 1}}
    assert deepspeed_config(config(deepspeed=None)) is None
    with pytest.raises(RecipeError, match="'zero9': neither a preset"):
        deepspeed_config(config(deepspeed="zero9"))
    (tmp_path / "own.json").write_text("{")
    with pytest.raises(RecipeError, match="not JSON"):
        deepspeed_config(config(deepspeed=own))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu is 2, the recipe's .* means 1"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, the recipe's .* means 4"),
        ({"train_batch_size": 6}, "train_batch_size is 6, the recipe makes 4 packed rows a device"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, the recipe's .* means 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, the recipe's .* means False"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled is True"),
        ({"optimizer": {"type": "AdamW"}}, "has a section 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused(file: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        deepspeed_config(config(deepspeed=write(tmp_path, file)))


def test_a_file_may_say_what_the_recipe_says(tmp_path: Path) -> None:
    file = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
    }
    assert deepspeed_config(config(deepspeed=write(tmp_path, file), num_processes=2)) == file


def test_a_refusal_comes_before_anything_is_loaded(tmp_path: Path) -> None:
    inputs = TrainInputs(packed=tmp_path, base_model=tmp_path, trust_remote_code=False, work=tmp_path / "work")
    section = config(deepspeed=write(tmp_path, {"gradient_accumulation_steps": 8}))
    with pytest.raises(RecipeError, match="gradient_accumulation_steps is 8"):
        train_adapter(inputs, section, 1, tmp_path / "out")
    assert not (tmp_path / "work" / "train.log").exists()  # no process was started


def test_float16_needs_a_gpu() -> None:
    half = config(dtype="float16")
    with pytest.raises(RecipeError, match="float16: needs a GPU"):
        check_training(half, 1, cuda=False)
    assert check_training(half, 1, cuda=True) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "nf4", "lora": None}, "a 4-bit base cannot do"),
        ({"lora": {"init_lora_weights": "loftq"}}, "loftq corrects 4-bit rounding"),
        (
            {"quantization": "nf4", "lora": {"init_lora_weights": "loftq", "use_dora": True}},
            "use_dora's lengths no longer fit",
        ),
        ({"quantization": "nf4", "lora": {"init_lora_weights": "pissa"}}, "a base that is kept nowhere"),
        ({"lora": {"init_lora_weights": "pissa_niter_0"}}, "one of true, gaussian, pissa, pissa_niter_16"),
        ({"lora": {"init_lora_weights": "olora"}}, "no converter here was tried with it"),
        ({"lora": {"init_lora_weights": "kaiming"}}, "one of true, gaussian, pissa"),
        ({"lora": {"init_lora_weights": False}}, "false starts from random A and B"),
    ],
)
def test_sections_that_cannot_be_right_are_refused_in_the_recipe(changes: dict[str, Any], message: str) -> None:
    section = {"quantization": "none", **changes}
    recipe = {"name": "n", "base_model": {"path": "m"}, "datasets": [{"path": "d"}], "train": section}
    with pytest.raises(RecipeError, match=message):
        resolve(recipe)


def write(folder: Path, file: dict[str, Any]) -> str:
    """A JSON file; its path."""
    path = folder / "own.json"
    path.write_text(json.dumps(file))
    return str(path)


def test_what_fails_under_zero3_is_refused_and_what_costs_is_said() -> None:
    with pytest.raises(RecipeError, match="use_dora with deepspeed zero3: under ZeRO-3"):
        check_training(config(deepspeed="deepspeed_zero3", lora={"use_dora": True}))
    with pytest.raises(RecipeError, match="init_lora_weights pissa with deepspeed zero3: it takes whole weights"):
        check_training(config(deepspeed="zero3", lora={"init_lora_weights": "pissa"}))
    assert check_training(config(deepspeed="zero3"), 2, cuda=False) == []
    assert check_training(config(quantization="nf4", deepspeed="zero3"), 2, cuda=False) == [
        "note: deepspeed zero3 with quantization nf4: each of the 2 ranks first loads the whole 4-bit base, then it is "
        "partitioned"
    ]
