"""What is used is what was planned: whatever a step reads is edited between plan and use, and it must refuse."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_core import steps
from sft_core.artifacts import Outcome
from sft_core.as_planned import refuse_changes
from sft_core.errors import PlanError, RecipeError
from sft_core.fingerprint import hash_file_once
from sft_core.plan import Plan, plan_champion, plan_recipe
from sft_core.recipe import Recipe, resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROWS = [f'{{"text": "### Human: say w{i}### Assistant: w{i}!"}}' for i in range(60)]
READER = """
import beside

def read(row):
    return {"conversation": [{"input": row["text"], "output": beside.ANSWER}]}
"""
SCORER = "def score(messages, reference, answer):\n    return 1.0\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
DEEPSPEED = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
TASK = "task: mine\ndataset_path: json\n"


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(ROWS) + "\n")
    (tmp_path / "reader.py").write_text(READER)
    (tmp_path / "beside.py").write_text('ANSWER = "ok"\n')
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "zero.json").write_text(json.dumps(DEEPSPEED))
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "modeling_own.py").write_text("SIZE = 1\n")
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "base_model": {"path": "base"},
        "datasets": [{"path": "rows.jsonl", "map_fn": "reader.py:read"}],
        "eval_fraction": 0.2,
        "pack": {"max_length": 64, "chat_template": "template.jinja"},
        "train": {"deepspeed": "zero.json"},
        "evaluate": {"scorer": "scorer.py:score"},
    }
    return resolve(values, changes)


def travelled(plan: Plan) -> Plan:
    """As a worker gets it."""
    return Plan.from_dict(json.loads(json.dumps(plan.as_dict())))


def run_of(recipe: Recipe) -> Retraining:
    return Retraining(recipe, travelled(plan_recipe(recipe)), Store("store"), lambda _: None)


def append(name: str, text: str) -> Callable[[Path], None]:
    """An edit of a file of the project."""

    def edit(project: Path) -> None:
        with (project / name).open("a") as file:
            file.write(text)

    return edit


def flip_a_weight(project: Path) -> None:
    """Another byte at the end, and the time of the file as it was."""
    path = project / "base" / "model.safetensors"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


BASE_EDITS = {
    "weights": flip_a_weight,
    "config": append("base/config.json", "\n"),
    "tokenizer": append("base/tokenizer_config.json", "\n"),
    "code": append("base/modeling_own.py", "SIZE = 2\n"),
    "generation_config": append("base/generation_config.json", "\n"),
}
EDITS = [
    ("fetch/0", append("rows.jsonl", ROWS[0] + "\n"), r"fetch/0 \(rows\.jsonl\): .*source\.files\.0\.sha256"),
    ("normalize", append("reader.py", "\nread = lambda row: row\n"), r"sources\.0\.map_fn\.code\.:read"),
    ("normalize", append("beside.py", "ANSWER = 'no'\n"), r"sources\.0\.map_fn\.code\.beside:ANSWER"),
    ("pack", append("template.jinja", "!"), "chat_template"),
    ("pack", BASE_EDITS["tokenizer"], "tokenizer: "),
    ("train", append("zero.json", " "), None),
    (
        "train",
        lambda p: (p / "zero.json").write_text('{"zero_optimization": {"stage": 3}}'),
        "deepspeed.*stage: 2 -> 3",
    ),
    ("evaluate/tuned", append("scorer.py", "score = len\n"), r"scorer\.code\.:score"),
    ("evaluate/base", append("scorer.py", "score = len\n"), r"scorer\.code\.:score"),
    *(
        (key, edit, "base_model")
        for key in ("train", "convert", "merge", "evaluate/base")
        for edit in BASE_EDITS.values()
    ),
]


@pytest.mark.parametrize(("key", "edit", "names"), EDITS)
def test_what_was_edited_after_planning_is_refused_by_name(
    project: Path, key: str, edit: Callable[[Path], None], names: str | None
) -> None:
    run = run_of(recipe())
    edit(project)
    if names is None:  # only what decides the content counts
        refuse_changes(run.recipe, run.plan, key)
        return
    with pytest.raises(PlanError, match=names) as refused:
        run_step(run, key)
    assert str(refused.value).startswith(key)
    assert str(refused.value).count("\n") == 0
    assert run.store.manifests(key.partition("/")[0]) == []


def test_code_of_a_tokenizer_counts_where_it_may_run(project: Path) -> None:
    trusting = {"path": "base", "trust_remote_code": True}
    (project / "base" / "tokenization_own.py").write_text("SIZE = 1\n")
    run = run_of(recipe(base_model=trusting))
    append("base/tokenization_own.py", "SIZE = 2\n")(project)
    with pytest.raises(PlanError, match="pack: .*tokenizer: "):
        run_step(run, "pack")


def test_tasks_of_the_harness_count_with_what_lies_beside_them(project: Path) -> None:
    pytest.importorskip("lm_eval")
    (project / "tasks").mkdir()
    (project / "tasks" / "mine.yaml").write_text(TASK)
    (project / "tasks" / "used.py").write_text("def process(row):\n    return row\n")
    run = run_of(recipe(evaluate={"harness_tasks": ["tasks/mine.yaml"]}))
    append("tasks/used.py", "process = str\n")(project)
    with pytest.raises(PlanError, match=r"harness\.files\.mine\.used\.py"):
        run_step(run, "evaluate/base")


@pytest.mark.parametrize(
    ("key", "module"),
    [
        *((name, name) for name in ("normalize", "pack", "train", "convert", "merge")),
        *(("fetch/0", "fetch"), ("evaluate/tuned", "evaluate"), ("evaluate/base", "evaluate")),
    ],
)
def test_a_worker_with_another_checkout_is_refused_with_both_versions(
    project: Path, monkeypatch: pytest.MonkeyPatch, key: str, module: str
) -> None:
    run = run_of(recipe())
    monkeypatch.setattr(f"sft_core.{module}.STEP_VERSION", 777)
    with pytest.raises(PlanError, match=r"version: \d+ -> 777; this machine has another version of sft-flows"):
        run_step(run, key)


def test_a_module_that_was_edited_after_this_process_imported_it_is_refused(project: Path) -> None:
    """The plan reads the new source; the process has the old one in memory."""
    (project / "own_maps_of_this_test.py").write_text(READER.replace("beside.ANSWER", "'old'"))
    mine = recipe(datasets=[{"path": "rows.jsonl", "map_fn": "own_maps_of_this_test:read"}])
    for key in ("fetch/0", "normalize"):
        run_step(run_of(mine), key)
    (project / "own_maps_of_this_test.py").write_text(READER.replace("beside.ANSWER", "'new'"))
    with pytest.raises(RecipeError, match="own_maps_of_this_test:read': edited since this process imported it"):
        run_step(run_of(mine), "normalize")


def test_other_tokenizers_than_planned_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(recipe())
    monkeypatch.setattr("sft_core.plan_parts.version", lambda _: "0.1")
    with pytest.raises(PlanError, match=r"pack: .*tokenizers: \S+ -> 0\.1"):
        run_step(run, "pack")


def test_a_plan_of_another_recipe_is_refused(project: Path) -> None:
    planned = run_of(recipe())
    run = replace(planned, recipe=recipe(train={"learning_rate": 0.5}))
    with pytest.raises(PlanError, match=r"train\.learning_rate: \S+ -> 0\.5"):
        run_step(run, "train")


@pytest.mark.parametrize("key", ["merge", "evaluate/tuned", "evaluate/base"])
def test_a_plan_that_was_tampered_with_is_refused(project: Path, key: str) -> None:
    run = run_of(recipe())
    other = replace(run.plan[key], fingerprint="ab" * 32)
    with pytest.raises(PlanError, match=f"{key}.*fingerprint"):
        run_step(replace(run, plan=replace(run.plan, steps={**run.plan.steps, key: other})), key)
    if key.startswith("evaluate"):
        with pytest.raises(PlanError, match="chat_template"):
            run_step(replace(run, plan=replace(run.plan, chat_template="{{ messages }}")), key)


@pytest.mark.parametrize(
    ("key", "edit", "names"),
    [
        ("normalize", append("beside.py", "ANSWER = 'no'\n"), "beside:ANSWER"),
        ("pack", append("template.jinja", "!"), "chat_template"),
        ("pack", BASE_EDITS["tokenizer"], "tokenizer"),
    ],
)
def test_what_is_edited_while_a_step_works_is_refused_too(
    project: Path, monkeypatch: pytest.MonkeyPatch, key: str, edit: Callable[[Path], None], names: str
) -> None:
    run = run_of(recipe())
    for earlier in ("fetch/0", "normalize", "pack"):
        if earlier == key:
            break
        run_step(run, earlier)
    build = steps.BUILDERS[key]

    def edited_meanwhile(*arguments: Any) -> Any:
        outcome = build(*arguments)
        edit(project)
        return outcome

    monkeypatch.setitem(steps.BUILDERS, key, edited_meanwhile)
    with pytest.raises(PlanError, match=names):
        run_step(run, key)
    assert run.store.manifests(key) == []


@pytest.mark.parametrize("train", [{}, {"lora": None, "quantization": "none"}])
@pytest.mark.parametrize("template", ["template.jinja", "chatml", None])
def test_nothing_is_refused_where_nothing_changed(project: Path, train: dict[str, Any], template: str | None) -> None:
    if template is None:
        (project / "base" / "chat_template.jinja").write_text(TEMPLATE)
    mine = recipe(
        train=train, pack={"chat_template": template}, eval_datasets=[{"path": "rows.jsonl", "map_fn": "oasst1"}]
    )
    plan = plan_recipe(mine)
    for champion in (plan["merge"].fingerprint, "cd" * 32):
        with_champion = travelled(plan_champion(plan, mine, champion))
        for key in with_champion.steps:
            refuse_changes(mine, with_champion, key)


def test_a_settled_file_is_read_once_and_again_when_it_changed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_core.fingerprint.SETTLED_SECONDS", -1.0)  # as if it had been written long ago
    path = project / "rows.jsonl"
    path.write_bytes(b"abc")
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file_once(path) == of_abc
    monkeypatch.setattr("sft_core.fingerprint.hash_file", lambda _: "read again")
    assert hash_file_once(path) == of_abc
    stat = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time of the content
    assert hash_file_once(path) == "read again"


def test_state_of_a_training_whose_base_changed_meanwhile_is_not_resumed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(recipe())
    checkpoint = run.store.work_in_progress("train", run.plan["train"].fingerprint) / "checkpoint-1" / "adapter"

    def train(*_: Any) -> Outcome:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("trained on a base that nobody planned")
        flip_a_weight(project)
        return Outcome()

    monkeypatch.setitem(steps.BUILDERS, "train", train)
    with pytest.raises(PlanError, match="base_model"):
        run_step(run, "train")
    assert not checkpoint.exists()
    assert run.store.manifests("train") == []
