"""Addresses: what changes them and what does not, and what `explain` says of it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_core.errors import ModelError, PlanError, RecipeError, SourceError
from sft_core.explain import explain_plan
from sft_core.plan import Plan, plan_champion, plan_recipe
from sft_core.recipe import Recipe, resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROWS = [f'{{"text": "### Human: say w{i}### Assistant: w{i}!"}}' for i in range(60)]
MAP_FN = '''
SUFFIX = "!"  # how answers end


def finish(text):
    return text + SUFFIX


def unrelated():
    return 1


def read(row):
    """Doc."""
    return {"conversation": [{"input": row["text"], "output": finish("ok")}]}
'''


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(ROWS) + "\n")
    (tmp_path / "reader.py").write_text(MAP_FN)
    shutil.copytree(tiny_model, tmp_path / "base")
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "base_model": {"path": "base"},
        "datasets": [{"path": "rows.jsonl", "map_fn": "oasst1"}],
        "eval_fraction": 0.2,
        "pack": {"max_length": 64, "chat_template": "chatml"},
    }
    return resolve(values, changes)


def fingerprints(plan: Plan) -> dict[str, str]:
    return {key: step.fingerprint for key, step in plan.steps.items()}


def changed(before: Plan, after: Plan) -> set[str]:
    old, new = fingerprints(before), fingerprints(after)
    return {key for key in new if old[key] != new[key]}


ALL = {
    "fetch/0",
    "normalize",
    "pack",
    "train",
    "convert",
    "merge",
    "evaluate/tuned",
    "evaluate/base",
}


def test_the_plan_names_every_step_in_order(project: Path) -> None:
    assert set(plan_recipe(recipe()).steps) == ALL
    assert next(iter(plan_recipe(recipe()).steps)) == "fetch/0"


def test_touching_moving_or_copying_changes_nothing(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = plan_recipe(recipe())
    os.utime(project / "rows.jsonl", (1, 1))
    moved = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(project / "rows.jsonl", moved / "other-name.jsonl")
    shutil.copytree(project / "base", moved / "other-base")
    after = plan_recipe(
        recipe(
            base_model={"path": str(moved / "other-base")},
            datasets=[{"path": str(moved / "other-name.jsonl"), "map_fn": "oasst1"}],
        )
    )
    assert changed(before, after) == set()


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({"train": {"learning_rate": 1e-3}}, {"train", "convert", "merge", "evaluate/tuned"}),
        ({"train": {"save_steps": 1, "logging_steps": 1}}, set()),
        ({"train": {"gradient_checkpointing": "auto", "fused_lora": False, "use_liger_kernel": False}}, set()),
        ({"register": {"model_name": "other"}, "compute": {"train": "train/gpu"}}, set()),
        ({"store": "elsewhere", "name": "other"}, set()),
        ({"evaluate": {"primary_metric": "exact_match"}}, set()),
        ({"evaluate": {"max_new_tokens": 5}}, {"evaluate/tuned", "evaluate/base"}),
        ({"merge": {"base": "full"}}, {"merge", "evaluate/tuned"}),
        ({"pack": {"max_length": 32}}, ALL - {"fetch/0", "normalize"}),
        ({"pack": {"chat_template": "plain"}}, ALL - {"fetch/0", "normalize"}),
        ({"eval_fraction": 0.3}, ALL - {"fetch/0"}),
        ({"seed": 1}, ALL - {"fetch/0"}),
    ],
)
def test_a_change_of_the_recipe_rebuilds_what_depends_on_it(
    project: Path, change: dict[str, Any], rebuilt: set[str]
) -> None:
    assert changed(plan_recipe(recipe()), plan_recipe(recipe(**change))) == rebuilt


def test_one_changed_row_rebuilds_all_that_follows(project: Path) -> None:
    before = plan_recipe(recipe())
    (project / "rows.jsonl").write_text("\n".join([*ROWS[:-1], ROWS[-1].replace("w59", "W59")]) + "\n")
    assert changed(before, plan_recipe(recipe())) == ALL


def test_a_changed_base_model_rebuilds_training_but_not_the_rows(project: Path) -> None:
    before = plan_recipe(recipe())
    weights = project / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert changed(before, plan_recipe(recipe())) == ALL - {"fetch/0", "normalize", "pack"}


@pytest.mark.parametrize(
    ("old", "new", "rebuilds"),
    [
        ("text + SUFFIX", 'text + SUFFIX + "?"', True),
        ('SUFFIX = "!"', 'SUFFIX = "?"', True),
        ("# how answers end", "# another comment", False),
        ("return 1", "return 2", False),
        ('"""Doc."""', '"""Other doc."""', False),
    ],
)
def test_a_users_map_fn_counts_with_its_helpers_and_without_comments(
    project: Path, old: str, new: str, rebuilds: bool
) -> None:
    own = recipe(datasets=[{"path": "rows.jsonl", "map_fn": "reader.py:read"}])
    before = plan_recipe(own)
    (project / "reader.py").write_text(MAP_FN.replace(old, new))
    assert ("normalize" in changed(before, plan_recipe(own))) == rebuilds


def test_a_plan_travels_as_plain_values(project: Path) -> None:
    plan = plan_recipe(recipe())
    assert Plan.from_dict(plan.as_dict()) == plan


def test_the_champions_evaluation_is_the_tuned_one_if_they_are_the_same_model(project: Path) -> None:
    plan = plan_recipe(recipe())
    same = plan_champion(plan, recipe(), plan["merge"].fingerprint)
    assert same["evaluate/champion"].fingerprint == plan["evaluate/tuned"].fingerprint
    other = plan_champion(plan, recipe(), "00" * 32)
    assert other["evaluate/champion"].fingerprint != plan["evaluate/tuned"].fingerprint


def test_missing_things_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"nothing\.jsonl"):
        plan_recipe(recipe(datasets=[{"path": "nothing.jsonl"}]))
    with pytest.raises(ModelError, match="no such folder"):
        plan_recipe(recipe(base_model={"path": "nobody/no-model"}))
    (project / "base" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        plan_recipe(recipe())


def test_explain_says_which_part_changed(project: Path) -> None:
    store = Store("store")
    first = recipe()
    run = Retraining(first, plan_recipe(first), store)
    assert {e.why for e in explain_plan(run.plan, store, "test")} == {"never built"}
    for key in ("fetch/0", "normalize", "pack"):
        assert not run_step(run, key).reused
        assert run_step(run, key).reused
    second = recipe(pack={"max_length": 32})
    explained = {e.key: e for e in explain_plan(plan_recipe(second), store, "test")}
    assert explained["normalize"].reused
    assert explained["pack"].why == "pack.max_length: 64 -> 32"
    assert not explained["train"].reused


def test_a_source_that_changes_between_plan_and_fetch_stops_the_run(project: Path) -> None:
    run = Retraining(recipe(), plan_recipe(recipe()), Store("store"))
    (project / "rows.jsonl").write_text(ROWS[0] + "\n")
    with pytest.raises(PlanError, match="changed since this run was planned"):
        run_step(run, "fetch/0")
    assert run.store.manifests("fetch") == []


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["q_prj"]}, r"train\.lora\.target_modules.*q_prj"),
        ({"modules_to_save": ["lm_haed"]}, r"train\.lora\.modules_to_save.*lm_haed"),
        ({"trainable_tokens": ["<|nothing|>"]}, r"train\.lora\.trainable_tokens: '<\|nothing\|>' is no token"),
        (
            {"trainable_tokens": ["<|im_end|>"], "modules_to_save": ["lm_head"]},
            r"lm_head is trained by modules_to_save or target_modules already",
        ),
        ({"target_modules": ["input_layernorm"]}, r"train\.lora\.target_modules.*not supported"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_no_plan(project: Path, lora: dict[str, Any], says: str) -> None:
    """Found before rows are fetched and a GPU is waited for: a plan is what the dry run makes too."""
    with pytest.raises(RecipeError, match=says):
        plan_recipe(recipe(train={"lora": lora}))
