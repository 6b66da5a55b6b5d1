"""What a rehearsal says of the real run: rows of a source, optimizer steps, tokens, memory."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.plan import plan_recipe
from sft_core.recipe import DatasetConfig, resolve
from sft_core.rehearse import prepare_rehearsal, rows
from sft_core.rehearse.estimate import estimate_length
from sft_core.rehearse.rows import sample_rows, texts_of
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ORDERS = Path(__file__).parents[2] / "demo" / "data" / "orders.jsonl"


def test_the_first_rows_are_taken_as_they_stand(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"a":  1}\n{broken\n{"a": "\\ud83d"}\n{"a": 4}\n')
    sample = sample_rows(DatasetConfig(path=str(source)), tmp_path / "out.jsonl", 3)
    assert (tmp_path / "out.jsonl").read_text() == '{"a":  1}\n{broken\n{"a": "\\ud83d"}\n'
    assert (sample.rows, sample.total, sample.counted) == (3, 4, True)


def test_every_format_gives_one_line_a_row(tmp_path: Path) -> None:
    values = [{"a": f"é{i}"} for i in range(5)]
    (tmp_path / "pretty.json").write_text(json.dumps(values, indent=2, ensure_ascii=False))
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "table.parquet")
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
    (tmp_path / "table.csv").write_text("a\n" + "".join(f"é{i}\n" for i in range(5)))
    for name in ("pretty.json", "table.parquet", "packed.jsonl.gz", "table.csv"):
        out = tmp_path / "out" / f"{name}.jsonl"
        out.parent.mkdir(exist_ok=True)
        sample = sample_rows(DatasetConfig(path=str(tmp_path / name)), out, 2)
        assert [json.loads(line) for line in out.read_text().splitlines()] == values[:2], name
        assert sample.total == 5
        assert list(texts_of([out])) == ["é0", "é1"]


def test_rows_of_a_large_file_are_estimated_by_its_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "COUNTED_BYTES", 1000)
    sample = sample_rows(DatasetConfig(path=str(ORDERS)), tmp_path / "out.jsonl", 200)
    assert not sample.counted
    assert sample.total == pytest.approx(600, rel=0.05)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_length_of_the_real_run_is_estimated_from_a_third_of_its_rows(
    packing: str, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = resolve(
        {
            "name": "orders",
            "store": str(tmp_path / "store"),
            "base_model": {"path": str(tiny_model)},
            "datasets": [{"path": str(ORDERS), "map_fn": "oasst1", "weight": 2}],
            "pack": {"chat_template": "chatml", "max_length": 512, "packing": packing},
            "train": {"num_train_epochs": 2, "gradient_accumulation_steps": 4, "num_processes": 2},
        }
    )
    real = prepared(Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None))
    facts = real.store.find("pack", real.plan["pack"].fingerprint).facts  # type: ignore[union-attr]
    rehearsal = prepare_rehearsal(recipe, tmp_path / "scratch", on_line=lambda _: None)
    small = rehearsal.recipe
    rehearsed = prepared(Retraining(small, plan_recipe(small), Store(small.store), lambda _: None))
    length = estimate_length(recipe, small, rehearsed.folder("pack"), rehearsal.samples)
    assert length is not None
    assert length.epoch_tokens == pytest.approx(facts["epoch_tokens"], rel=0.05)
    assert length.optimizer_steps == pytest.approx(2 * facts["packed_rows"] / 8, rel=0.1)


def prepared(run: Retraining) -> Retraining:
    for key in ("fetch/0", "normalize", "pack"):
        run_step(run, key)
    return run
