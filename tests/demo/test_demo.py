"""The demo cannot be faked: its answers hold numbers that only the request has, and shuffled answers teach nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from demo.base_model import make_base_model
from demo.dataset import main as write_dataset
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Built, Retraining, run_step
from sft_core.store import Store

ROOT = Path(__file__).parents[2]
DATA = ROOT / "demo" / "data" / "orders.jsonl"
KEYS = ("fetch/0", "normalize", "pack", "train", "convert", "merge", "evaluate/tuned", "evaluate/base")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    make_base_model(folder)
    return folder


def run(base: Path, data: Path, store: Path) -> dict[str, Built]:
    recipe = resolve(
        "demo",
        {"store": str(store), "base_model": {"path": str(base)}, "datasets": [{"path": str(data), "map_fn": "oasst1"}]},
    )
    retraining = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)
    return {key: run_step(retraining, key) for key in KEYS}


def exact_match(built: dict[str, Built], which: str) -> float:
    return float(built[f"evaluate/{which}"].manifest.facts["metrics"]["exact_match"])


def conversations(store: Path, side: str) -> list[list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    (folder,) = (store / "normalize").glob("*/" + side)
    return [row["messages"] for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_climbs_from_near_zero_to_above_nine_tenths_on_unseen_requests(base_model: Path, tmp_path: Path) -> None:
    built = run(base_model, DATA, tmp_path)
    assert exact_match(built, "base") <= 0.05
    assert exact_match(built, "tuned") > 0.9
    trained = {m[0]["content"] for m in conversations(tmp_path, "train")}
    held_out = {m[0]["content"] for m in conversations(tmp_path, "heldout")}
    assert len(held_out) >= 50
    assert not trained & held_out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shuffled_answers_teach_nothing(base_model: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["text"] for line in DATA.read_text().splitlines()]
    parts = [row.rsplit("### Assistant: ", 1) for row in rows]
    answers = [answer for _, answer in parts]
    random.Random(0).shuffle(answers)
    texts = [f"{request}### Assistant: {answer}" for (request, _), answer in zip(parts, answers, strict=True)]
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert exact_match(run(base_model, shuffled, tmp_path / "store"), "tuned") <= 0.05


def test_the_shipped_rows_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dataset", str(tmp_path / "rows.jsonl")])
    write_dataset()
    assert (tmp_path / "rows.jsonl").read_bytes() == DATA.read_bytes()


def test_every_row_is_its_own_and_answers_are_many() -> None:
    rows = [json.loads(line)["text"] for line in DATA.read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 600
    assert len({row.rsplit("### Assistant: ", 1)[1] for row in rows}) >= 500
