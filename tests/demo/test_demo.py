"""The demo cannot be faked: its answers hold numbers that only the request has, and shuffled answers teach nothing.

What the whole demo reaches is asserted where it runs from the wheel (tests/services/test_wheel.py).
"""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from demo.base_model import IM_END, IM_START, make_model, make_tokenizer, plain_text
from demo.dataset import KINDS
from demo.dataset import main as write_dataset
from sft_core.evaluate import EvaluatedModel, evaluate_model
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROOT = Path(__file__).parents[2]
DATA = ROOT / "demo" / "data" / "orders.jsonl"
NUMBER = re.compile(r"[A-Z]{2}[0-9]{4}")
BY_HEART = {
    "eval_fraction": 0,
    "normalize": {"near_duplicates": None},
    "train": {
        "lora": None,
        "quantization": "none",
        "deepspeed": None,
        "num_train_epochs": 25,
        "per_device_train_batch_size": 1,
        "learning_rate": 3e-3,
    },
    "evaluate": {"primary_metric": "loss"},
}
"""48 rows of the demo are learned by heart so."""
STEPS = ("fetch/0", "fetch/1", "normalize", "pack", "train", "merge")


def retraining(base: Path, store: Path, **changes: Any) -> Retraining:
    """Of the demo's recipe."""
    recipe = resolve("demo", {"store": str(store), "base_model": {"path": str(base)}, **changes})
    return Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)


def run_steps(run: Retraining, *keys: str) -> Retraining:
    for key in keys:
        run_step(run, key)
    return run


def texts() -> list[str]:
    return [json.loads(line)["text"] for line in DATA.read_text().splitlines()]


def source(file: Path, rows: list[str]) -> dict[str, str]:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return {"path": str(file), "map_fn": "oasst1"}


@pytest.mark.slow
def test_shuffled_answers_teach_nothing(tmp_path: Path) -> None:
    """Trained to know its rows by heart, a model answers what it was trained on and nothing else. Were the answer to an
    unseen request to be had anywhere, among the trained rows or in the prompt, it would be answered as well."""
    tokenizer = make_tokenizer(0)
    for part in (tokenizer, make_model(tokenizer, 0)):
        part.save_pretrained(tmp_path / "base")
    parts = [row.split("### Assistant: ") for row in texts() if row.count("### Human: ") == 1][:60]
    answers = [answer for _, answer in parts]
    random.Random(0).shuffle(answers)
    rows = [f"{request}### Assistant: {answer}" for (request, _), answer in zip(parts, answers, strict=True)]
    seen, unseen = source(tmp_path / "seen.jsonl", rows[:48]), source(tmp_path / "unseen.jsonl", rows[48:])
    store = tmp_path / "store"
    learned = retraining(tmp_path / "base", store, datasets=[seen], eval_datasets=[unseen], **BY_HEART)
    run_steps(learned, *STEPS)
    swapped = retraining(tmp_path / "base", store, datasets=[unseen], eval_datasets=[seen], **BY_HEART)
    run_steps(swapped, "fetch/0", "fetch/1", "normalize")
    assert right_answers(learned, of=swapped, out=tmp_path / "seen") > 0.9
    assert right_answers(learned, of=learned, out=tmp_path / "unseen") == 0


def right_answers(run: Retraining, of: Retraining, out: Path) -> float:
    """Which part of the held-out rows of `of` the model that `run` trained answers word for word."""
    model = EvaluatedModel(folder=run.folder("merge"), max_length=run.recipe.pack.max_length)
    report = evaluate_model(model, of.folder("normalize"), run.recipe.evaluate, run.recipe.seed, out)
    return float(report.facts["metrics"]["exact_match"])


def test_the_base_model_has_seen_no_chat() -> None:
    """Its tokenizer spells order numbers out; its text has no chat token and no word of an answer."""
    assert make_tokenizer(0).tokenize("BX4712") == list("BX4712")
    said = [words for kind in KINDS for words in kind.answer.split("{id}") if len(words) > 8]
    papers = "".join(itertools.islice(plain_text(1), 2000))
    assert not [word for word in (IM_START, IM_END, "Human", "Assistant", *said) if word in papers]


def test_held_out_requests_are_unseen(tiny_model: Path, tmp_path: Path) -> None:
    data = [{"path": str(DATA), "map_fn": "oasst1"}]
    folder = run_steps(retraining(tiny_model, tmp_path, datasets=data), "fetch/0", "normalize").folder("normalize")
    trained, held_out = (requests(folder / side) for side in ("train", "heldout"))
    assert len(held_out) >= 50
    assert not trained & held_out


def requests(side: Path) -> set[str]:
    rows = [row for path in side.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["messages"][0]["content"] for row in rows}


def test_the_shipped_rows_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dataset", str(tmp_path / "rows.jsonl")])
    write_dataset()
    assert (tmp_path / "rows.jsonl").read_bytes() == DATA.read_bytes()


def test_every_row_is_its_own_and_its_answers_hold_its_own_number() -> None:
    rows = texts()
    assert len(rows) == len(set(rows)) == 600
    numbers = [set(NUMBER.findall(row)) for row in rows]
    assert all(len(found) == 1 for found in numbers)
    assert len(set.union(*numbers)) == 600  # in no other row
    for row, (number,) in zip(rows, numbers, strict=True):
        request, *answers = row.split("### Assistant: ")
        assert number in request
        assert all(number in answer for answer in answers)
