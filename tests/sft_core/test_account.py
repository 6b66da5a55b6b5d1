"""One account from source rows to packed rows: what both steps lose counts together, against one bound."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_core.account import Loss, account_line, check_conserved, is_over, loss_of, lost_fraction
from sft_core.artifacts import Manifest
from sft_core.errors import DataError, RecipeError
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROWS, EMPTY, LONG = 200, 8, 6
LIMIT = 96
"""Tokens a row; the tiny model's tokenizer has one for each byte."""


@pytest.fixture
def run_of(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """200 rows: 8 without an answer (4.0%), 6 too long (some of 192, about 3%); a run of them in one store."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"say w{i * 7919 % 10007}", "input": "", "output": f"w{i}!"} for i in range(ROWS)]
    for row in rows[:EMPTY]:
        row["output"] = ""
    for row in rows[-LONG:]:
        row["instruction"] += " please" * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(lines: list[str] | None = None, **changes: Any) -> Retraining:
        values: dict[str, Any] = {
            "name": "test",
            "base_model": {"path": str(tiny_model)},
            "datasets": [{"path": "rows.jsonl", "map_fn": "alpaca"}],
            "eval_fraction": 0.01,
            "normalize": {"near_duplicates": None},
            "pack": {"max_length": LIMIT, "chat_template": "chatml"},
            "seed": 1,
        }
        recipe = resolve(values, changes)
        said = [] if lines is None else lines
        return Retraining(recipe, plan_recipe(recipe), Store("store"), said.append)

    return make


def build(run: Retraining, *steps: str) -> Manifest:
    for step in ("fetch/0", *steps):
        built = run_step(run, step)
    return built.manifest


def test_two_losses_under_the_bound_are_over_it_together(run_of) -> None:
    run = run_of()
    normalized = build(run, "normalize")
    assert normalized.ledger["rows"]["set_aside"] == {"empty_answer": EMPTY}
    entered = normalized.facts["train_rows"]
    with pytest.raises(DataError) as caught:
        build(run, "normalize", "pack")
    message = str(caught.value)
    assert "are set aside, after 8 of 200 rows (4.0%) in normalize: " in message
    assert "is lost; max_quarantined_fraction allows 5.0%: " in message
    assert "overlong\nRaise pack.max_length (96), set pack.overlong to split or truncate, or raise" in message
    assert entered == 189  # 3 of 192 are held out, by the hash of their content
    assert not list(Path("store/pack").glob("*/manifest.json"))


def test_the_account_is_told_where_it_is_within_the_bound(run_of) -> None:
    lines: list[str] = []
    run = run_of(lines, max_quarantined_fraction=0.2)
    packed = build(run, "normalize", "pack")
    (account,) = [line for line in lines if "max_quarantined_fraction" in line]
    assert account.startswith("note: of the data ")
    assert "is lost (normalize 8 of 200 rows (4.0%); pack " in account
    assert account.endswith("max_quarantined_fraction allows 20.0%")
    rows = packed.ledger["rows"]
    assert rows == {"in": 189, "out": 183, "set_aside": {"overlong": LONG}}


def test_what_is_asked_for_is_no_loss(run_of) -> None:
    packed = build(run_of(pack={"overlong": "split"}), "normalize", "pack")
    assert packed.ledger["rows"] == {"in": 189, "out": 189, "set_aside": {}}


def test_a_stricter_bound_is_not_passed_by_an_artifact_that_is_there(run_of) -> None:
    build(run_of(max_quarantined_fraction=0.2), "normalize", "pack")
    with pytest.raises(DataError, match=r"8 of 200 rows \(4.0%\) cannot be used; max_quarantined_fraction allows 1.0%"):
        build(run_of(max_quarantined_fraction=0.01), "normalize")


@pytest.mark.parametrize("section", ["normalize", "pack"])
def test_there_is_one_key(run_of, section: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"{section}\.max_quarantined_fraction: unknown.*did you mean 'max_quarantined_fraction'"
    ):
        run_of(**{section: {"max_quarantined_fraction": 0.1}})


def test_the_unit_that_loses_most_counts() -> None:
    def entry(came: int, **aside: int) -> dict[str, Any]:
        return {"in": came, "out": came - sum(aside.values()), "set_aside": aside}

    ledger = {
        "rows": entry(100, overlong=1),
        "sequences": entry(120, overlong=2),
        "tokens": entry(9000, overlong=8000, truncated=500),
        "supervised_tokens": entry(1000, overlong=300, truncated=500, split_border=1),
    }
    loss = loss_of("pack", ledger)
    assert (loss.unit, loss.lost, loss.entered, loss.reasons) == ("trained tokens", 300, 1000, {"overlong": 300})
    assert str(loss) == "300 of 1,000 trained tokens (30.0%)"
    assert loss_of("normalize", {"rows": entry(10, near_duplicate=3, left_out=2, not_sampled=1)}).lost == 0


def test_fractions_of_what_came_to_each_step() -> None:
    first = Loss(step="normalize", unit="rows", lost=4, entered=100)
    second = Loss(step="pack", unit="sequences", lost=3, entered=100)
    assert lost_fraction(first, second) == pytest.approx(0.0688)
    assert is_over(0.05, first, second)
    assert not is_over(0.07, first, second)
    nothing = Loss(step="pack", unit="sequences", lost=0, entered=0)
    five = Loss(step="normalize", unit="rows", lost=5, entered=100)
    assert not is_over(0.05, five, nothing)  # no rounding: 1 - 0.95 is above 0.05 in floats
    assert account_line(0.05, nothing) is None


def test_pack_reads_every_conversation() -> None:
    with pytest.raises(AssertionError, match="9 conversations read, 10 were written"):
        check_conserved(10, 9)
