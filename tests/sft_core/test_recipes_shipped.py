"""The shipped recipes: each resolves, and the two of XTuner have XTuner's values (typed from its v0.2.0 configs)."""

from typing import Any

import pytest
import yaml

from sft_core.normalize.load import shipped_name
from sft_core.pack import shipped_templates
from sft_core.recipe import Recipe, resolve, shipped_recipes

NAMES = sorted(shipped_recipes())
MODELS = {
    "gemma3_1b_it_qlora_oasst1_e3": "google/gemma-3-1b-it",
    "internlm2_chat_7b_qlora_oasst1_e3": "internlm/internlm2-chat-7b",
    "llama3_1_8b_instruct_full_oasst1_e3": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_1_8b_instruct_qlora_oasst1_e3": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral_7b_instruct_qlora_oasst1_e3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral_8x7b_instruct_full_oasst1_e3": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen3_8b_full_oasst1_e3": "Qwen/Qwen3-8B",
    "qwen3_8b_qlora_oasst1_e3": "Qwen/Qwen3-8B",
}
XTUNER_BOTH = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "adam_beta2": 0.999,
    "weight_decay": 0,
    "max_grad_norm": 1,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": True,
    "save_steps": 31,  # 500 micro-batches / 16
    "save_total_limit": 2,
    "logging_steps": 1,  # 10 micro-batches / 16
}


def test_these_ship() -> None:
    assert set(NAMES) == {"demo", "demo_real", *MODELS}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_resolves_under_its_own_name_to_things_that_exist(name: str) -> None:
    recipe = resolve(name)
    assert recipe.name == name
    assert all(shipped_name(dataset.map_fn) == dataset.map_fn for dataset in recipe.datasets)
    assert recipe.pack.chat_template is None or recipe.pack.chat_template in shipped_templates()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_recipe_of_a_real_model_is_what_its_name_says(name: str) -> None:
    recipe = resolve(name)
    assert recipe.base_model.path == MODELS[name]
    assert (recipe.datasets[0].path, recipe.datasets[0].map_fn) == ("timdettmers/openassistant-guanaco", "oasst1")
    assert recipe.train.num_train_epochs == 3
    assert (recipe.train.lora is None, recipe.train.quantization) == (
        (True, "none") if "_full_" in name else (False, "nf4")
    )
    assert recipe.base_model.trust_remote_code is (name == "internlm2_chat_7b_qlora_oasst1_e3")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name: str) -> None:
    written = yaml.safe_load(shipped_recipes()[name])
    plain = Recipe(name="x", base_model={"path": "x"}, datasets=({"path": "x"},)).as_dict()  # type: ignore[arg-type]
    for path, value in leaves(written):
        default = lookup(plain, path)
        assert value != default or path[0] in ("name", "base_model", "datasets") or name == "demo", (path, value)


def leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, inner in value.items():
        found += leaves(inner, (*path, key)) if isinstance(inner, dict) else [((*path, key), inner)]
    return found


def lookup(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key] if isinstance(values, dict) else None
    return values


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_recipe_says_what_it_needs_and_that_it_was_not_run(name: str) -> None:
    header = shipped_recipes()[name].split("\nname:")[0]
    assert all(line.startswith("#") for line in header.split("\n"))
    assert "# Hardware: " in header
    assert "# Not run: " in header


def test_internlm2_qlora_has_xtuners_hyperparameters() -> None:
    recipe = resolve("internlm2_chat_7b_qlora_oasst1_e3")
    train = recipe.train.model_dump(mode="json")
    assert {key: train[key] for key in XTUNER_BOTH} == XTUNER_BOTH
    assert (train["learning_rate"], train["quantization"], train["dtype"]) == (2e-4, "nf4", "float16")
    lora = {key: train["lora"][key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    assert lora == {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    assert (recipe.pack.max_length, recipe.pack.chat_template) == (2048, "internlm2_chat")
    assert (recipe.pack.packing, recipe.pack.overlong) == ("best_fit", "truncate")


def test_mixtral_full_has_xtuners_hyperparameters() -> None:
    recipe = resolve("mixtral_8x7b_instruct_full_oasst1_e3")
    train = recipe.train.model_dump(mode="json")
    assert {key: train[key] for key in XTUNER_BOTH} == XTUNER_BOTH
    assert (train["learning_rate"], train["quantization"], train["lora"]) == (2e-5, "none", None)
    assert (train["deepspeed"], train["dtype"]) == ("zero3", "bfloat16")
    assert (recipe.pack.max_length, recipe.pack.chat_template) == (2048, "mixtral")
    assert (recipe.pack.packing, recipe.pack.overlong) == ("best_fit", "truncate")
