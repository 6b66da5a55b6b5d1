"""The recipe: resolved once, strict, overridable key by key."""

from pathlib import Path

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe import parse_settings, resolve, shipped_recipes
from sft_core.recipe.overrides import GeneralOverrides, TrainOverrides, collect_overrides
from sft_core.recipe.resolve import load_recipe

SMALL = {"name": "small", "base_model": {"path": "base"}, "datasets": [{"path": "rows.jsonl", "map_fn": "oasst1"}]}


def test_defaults_fill_what_the_recipe_leaves_out() -> None:
    recipe = resolve(SMALL)
    assert recipe.train.lora is not None
    assert (recipe.train.learning_rate, recipe.train.lora.r, recipe.pack.max_length) == (2e-4, 16, 2048)
    assert recipe.model_name == "small"


def test_overrides_change_only_what_they_mention() -> None:
    recipe = resolve({**SMALL, "train": {"lora": {"r": 4, "lora_alpha": 8}}}, {"train": {"lora": {"r": 2}}})
    assert recipe.train.lora is not None
    assert (recipe.train.lora.r, recipe.train.lora.lora_alpha) == (2, 8)


def test_every_wrong_key_is_named_with_its_place_and_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as fault:
        resolve({**SMALL, "trian": {}, "train": {"learning_rat": 1}})
    text = str(fault.value)
    assert "trian: unknown key (value {}); did you mean 'train'?" in text
    assert "train.learning_rat: unknown key (value 1); did you mean 'learning_rate'?" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"learning_rate": -1}}, "train.learning_rate: Input should be greater than 0 (value -1)"),
        (
            {"train": {"learning_rate": float("inf")}},
            "train.learning_rate: Input should be a finite number (value inf)",
        ),
        ({"train": {"max_steps": -1}}, "train.max_steps: Input should be greater than 0 (value -1)"),
        ({"eval_fraction": 0}, "nothing would be held out"),
        ({"datasets": []}, "datasets is empty"),
        ({"train": {"lora": None}}, "set quantization: none"),
        ({"name": "no spaces"}, "name:"),
    ],
)
def test_a_bad_value_is_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError) as fault:
        resolve({**SMALL, **change})
    assert words in str(fault.value)


def test_a_missing_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'dmo': did you mean 'demo'\?"):
        resolve("dmo")


def test_every_shipped_recipe_resolves() -> None:
    assert "demo" in shipped_recipes()
    for name in shipped_recipes():
        assert resolve(name).name


def test_settings_are_yaml_values_under_dotted_keys() -> None:
    assert parse_settings(["train.learning_rate=1e-4", "train.deepspeed=null", "name=a"]) == {
        "train": {"learning_rate": 1e-4, "deepspeed": None},
        "name": "a",
    }
    with pytest.raises(RecipeError, match="write it as section.key=value"):
        parse_settings(["train.learning_rate"])


def test_override_models_carry_no_default_that_could_overwrite() -> None:
    schema = TrainOverrides.model_json_schema()
    assert all("default" not in entry for entry in schema["properties"].values())
    assert schema.get("required", []) == []
    given = TrainOverrides.model_validate({"lora": {"r": 2}, "deepspeed": None})
    assert collect_overrides(None, {"train": given, "pack": None}) == {"train": {"lora": {"r": 2}, "deepspeed": None}}
    assert collect_overrides(GeneralOverrides.model_validate({"seed": 1}), {}) == {"seed": 1}


def test_a_recipe_file_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys, this is list"):
        resolve(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\ntrain: {max_steps: 1}\nname: b\n", "'name' stands in line 1 and again in line 3"),
        (
            "name: a\ntrain:\n  max_steps: 1\n  seed: 2\n  max_steps: 3\n",
            "'max_steps' stands in line 3 and again in line 5",
        ),
        ("name: a\ndatasets:\n- {path: x, path: y}\n", "'path' stands in line 3 and again in line 3"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"r.yaml: not YAML: the key {says}; the first one would be lost"):
        load_recipe(tmp_path / "r.yaml")


def test_a_key_in_the_wrong_place_is_named_with_its_place() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(
            {"name": "a", "base_model": {"path": "b"}, "datasets": [{"path": "c"}], "max_length": 9, "train": {"r": 4}}
        )
    text = str(caught.value)
    assert "  max_length: unknown key (value 9); did you mean 'pack.max_length'?" in text
    assert "  train.r: unknown key (value 4); " in text
