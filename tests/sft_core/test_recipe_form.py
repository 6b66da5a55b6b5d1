"""The form's models (what Prefect's UIs send for untouched fields changes nothing), and URLs that hold a credential."""

from typing import Any

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe import resolve
from sft_core.recipe.overrides import GeneralOverrides, MergeOverrides, TrainOverrides, collect_overrides

RECIPE: dict[str, Any] = {
    "name": "orders",
    "base_model": {"path": "base"},
    "datasets": [{"path": "rows.jsonl"}],
    "train": {"lora": None, "quantization": "none"},
}


def sent(**sections: Any) -> dict[str, Any]:
    """What counts of a form."""
    models = {"train": TrainOverrides, "merge": MergeOverrides}
    read = {key: models[key].model_validate(value) for key, value in sections.items()}
    return collect_overrides(GeneralOverrides.model_validate({}), read)


def test_an_opened_section_changes_nothing() -> None:
    assert sent(train={"lora": {}}, merge={}) == {}
    assert resolve(RECIPE, sent(train={"lora": {}})) == resolve(RECIPE)


def test_null_counts_only_where_it_can_be_meant() -> None:
    assert sent(train={"learning_rate": None, "dtype": None, "lora": {"r": None}}) == {}
    assert sent(train={"max_steps": None, "lora": None}) == {"train": {"max_steps": None, "lora": None}}


def test_false_and_zero_count() -> None:
    assert sent(train={"gradient_checkpointing": False, "weight_decay": 0}) == {
        "train": {"gradient_checkpointing": False, "weight_decay": 0.0}
    }


def test_a_switch_is_a_choice_of_two() -> None:
    """A switch of the form sends false where nobody touched it."""
    schema = TrainOverrides.model_json_schema()
    entry = schema["properties"]["fused_lora"]
    assert (entry["enum"], "type" in entry, "default" in entry) == ([True, False], False, False)
    recomputing = schema["properties"]["gradient_checkpointing"]["anyOf"]
    assert [kind.get("const", kind.get("enum")) for kind in recomputing] == ["auto", [True, False]]
    kinds = schema["$defs"]["LoraOverrides"]["properties"]["init_lora_weights"]["anyOf"]
    assert [kind.get("type") for kind in kinds] == ["string", None]


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:swordfish@bucket/rows.jsonl",
        "https://me:swordfish@host/rows.jsonl",
        "simplecache::s3://AKIA:sword/fish@bucket/rows",
        "https://host/rows.jsonl?X-Amz-Date=1&X-Amz-Signature=swordfish",
        "abfs://box/rows?sig=swordfish",
    ],
)
@pytest.mark.parametrize("key", ["store", "base_model", "datasets"])
def test_a_credential_in_a_url_is_refused_and_not_repeated(url: str, key: str) -> None:
    value: Any = {"store": url, "base_model": {"path": url}, "datasets": [{"path": "rows.jsonl"}, {"path": url}]}[key]
    with pytest.raises(RecipeError, match="the URL holds a credential") as refused:
        resolve({**RECIPE, key: value})
    assert {"store": "store", "base_model": "base_model.path", "datasets": "datasets.1.path"}[key] in str(refused.value)
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/rows.jsonl",
        "https://host:8080/data@v2.jsonl",
        "hf://datasets/user/repo@main/rows.jsonl",
        "https://host/rows.jsonl?version=3",
        "tcp://scheduler:8786",
        "C:\\rows@home.jsonl",
    ],
)
def test_other_addresses_pass(url: str) -> None:
    assert resolve({**RECIPE, "store": url}).store == url


def test_the_recipes_own_address_is_looked_at_too() -> None:
    with pytest.raises(RecipeError, match="the URL holds a credential") as refused:
        resolve("https://me:swordfish@host/recipe.yaml")
    assert "swordfish" not in str(refused.value)
