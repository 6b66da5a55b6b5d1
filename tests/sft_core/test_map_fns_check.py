"""`sft data check`: its figures, the map_fn it chooses, its two ways to print."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from sft_core.errors import RecipeError, SourceError
from sft_core.normalize import CheckReport, check_dataset
from sft_core.recipe import DatasetConfig


def check(tmp_path: Path, rows: list, map_fn: str | None = None) -> CheckReport:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    return check_dataset(DatasetConfig(path=str(tmp_path / "rows.jsonl")), map_fn)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", "check", *arguments])
    assert result.exit_code == 0, result
    return result.stdout


CHAT = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
TABLE = {"context": "CREATE TABLE t (a INT)", "question": "How many?", "answer": "SELECT COUNT(*) FROM t"}
PROSE = {"context": "Ann ran over the hill.", "question": "Who?", "answer": "It was Ann who ran over the hill."}
NO_OUTPUT = {"instruction": "Open it.", "input": "", "output": "<nooutput>"}
CALLS = [{"role": "user", "content": "A"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]


class TestReport:
    def test_figures(self, tmp_path):
        report = check(tmp_path, [{"input": "I", "output": "O"}, {"input": "I", "output": ""}, "{broken"], "default")
        assert (report.rows_in, report.rows_out, report.chosen) == (3, 1, False)
        assert report.quarantined == {"empty_answer": 1, "not_json": 1}
        assert report.examples["not_json"]["row_number"] == 3
        assert report.ledger["rows"] == {"in": 3, "out": 1, "set_aside": {"empty_answer": 1, "not_json": 1}}
        assert report.little_fits

    @pytest.mark.parametrize(
        ("row", "map_fn"),
        [
            ({"instruction": "I", "input": "", "output": "O"}, "alpaca"),
            ({"instruction_zh": "I", "input_zh": "", "output_zh": "O", "instruction": "I", "output": "O"}, "alpaca_zh"),
            ({"messages": CHAT}, "messages"),
            ({"messages": CALLS}, "messages"),
            (CHAT, "messages"),
            ({"text": "### Human: A### Assistant: B"}, "oasst1"),
            ({"text": "Once upon a time"}, "pretrain"),
            ({"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]}, "sharegpt"),
            (
                {"conversations": "[{'from': 'user', 'value': 'A'}, {'from': 'assistant', 'value': 'B'}]"},
                "msagent_react",
            ),
            ({"question": "Q", "answer": "A"}, "gsm8k"),
            ({"question": "Q", "answer": "A", "context": "C"}, "squad"),
            ({"question": "Q", "answers": {"text": ["A"]}, "context": "C", "title": "T"}, "squad"),
            ({"question": "Q", "answer": "A", "context": "CREATE TABLE c (a INT)"}, "sql"),
            ({"prompt": "P", "completion": "C"}, "prompt_completion"),
            ({"prompt": "P", "response": "R"}, "prompt_completion"),
            ({"instruction": "I", "output": "O", "system": "S"}, "alpaca"),
            ({"messages": CHAT, "tools": [{"name": "f"}]}, "messages"),
        ],
    )
    def test_the_best_fitting_one(self, tmp_path, row, map_fn):
        report = check(tmp_path, [row])
        assert (report.map_fn, report.chosen, report.rows_out) == (map_fn, True, 1)

    @pytest.mark.parametrize(
        ("rows", "map_fn"),
        [
            ([*[{"instruction": "Add.", "input": "2 3", "output": "5"}] * 3, NO_OUTPUT], "alpaca"),
            ([{"prompt": "A", "response": "B", "messages": [*CHAT, *CHAT]}], "messages"),
            ([{"input": "A", "output": "B", "conversation": [{"input": "A", "output": "B"}]}], "default"),
            ([{"instruction": "I", "context": "C", "response": "R", "prompt": "P"}], "dolly"),
            ([{"instruction_zh": "加。", "output_zh": "五", "instruction": "Add.", "output": "five"}], "alpaca_zh"),
            ([TABLE, PROSE, PROSE], "squad"),
            ([TABLE, TABLE, PROSE], "sql"),
        ],
    )
    def test_the_one_that_understands_most_not_the_one_that_ignores_most(self, tmp_path, rows, map_fn):
        assert check(tmp_path, rows).map_fn == map_fn

    def test_plain_text_is_the_last_choice(self, tmp_path):
        report = check(tmp_path, [{"text": "### Human: A### Assistant: B"}, *({"text": f"{n}"} for n in range(9))])
        assert (report.map_fn, report.fitting) == ("oasst1", {"oasst1": 1, "pretrain": 10})

    def test_nothing_fits(self, tmp_path):
        report = check(tmp_path, [{"q": 1}])
        assert (report.map_fn, report.fitting, report.rows_out) == ("default", {}, 0)
        assert report.columns == ("q",)

    def test_a_map_fn_of_ones_own(self, tmp_path):
        (tmp_path / "mine.py").write_text("def read(row):\n    return {'text': row['q']}\n")
        name = f"{tmp_path / 'mine.py'}:read"
        assert check(tmp_path, [{"q": "x"}], name).map_fn == name

    def test_faults(self, tmp_path):
        with pytest.raises(RecipeError, match="did you mean 'alpaca'"):
            check(tmp_path, [], "alpacca")
        with pytest.raises(SourceError, match=r"nope\.json"):
            check_dataset(DatasetConfig(path=str(tmp_path / "nope.json")))


class TestCommand:
    def test_text(self, tmp_path):
        check(tmp_path, [{"messages": CHAT}, {"messages": []}])
        assert run(str(tmp_path / "rows.jsonl")).split("\n")[1:] == [
            "map_fn: messages (the best fitting one)",
            "rows in: 2",
            "rows out: 1",
            "held out: 0 of them (eval_fraction 0.02)",
            "quarantined: 1",
            "  1 no_turns, such as rows.jsonl row 2: column 'messages' is empty",
            "warning: sft run would fail: 1 of 2 rows (50.0%) cannot be used; max_quarantined_fraction allows 5.0%.",
            "  1 no_turns, such as rows.jsonl row 2: column 'messages' is empty",
            "  Fix these rows, choose another map_fn for rows.jsonl (now messages; the columns of that row fit "
            "openai), or raise max_quarantined_fraction",
            "",
        ]

    def test_plain_text_is_said_to_be_one(self, tmp_path):
        check(tmp_path, [{"text": "A"}])
        assert "map_fn: pretrain (no other reads a row: plain text" in run(str(tmp_path / "rows.jsonl"))

    def test_advice_when_little_fits(self, tmp_path):
        check(tmp_path, [{"messages": CALLS, "id": 1}])
        path = str(tmp_path / "rows.jsonl")
        advice = "The columns (id, messages) also fit messages (reads 1 of the first 1 rows)"
        assert advice in run(path, "--map-fn", "openai_map_fn")
        check(tmp_path, [{"q": "\ud800"}])
        assert "No other shipped map_fn reads the columns (q); write your own: path.py:function" in run(path)

    def test_strict_is_an_error_where_a_run_would_fail(self, tmp_path):
        def status(rows: list, *options: str) -> tuple[int, str]:
            check(tmp_path, rows)
            result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "rows.jsonl"), *options])
            return result.exit_code, result.stdout

        def rows(count: int) -> list:
            return [
                {"input": f"What is {n * 7919 % 10007}?", "output": f"It is {n * 104729 % 99991}."}
                for n in range(count)
            ]

        few, many = rows(60), rows(900)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("{name: r, base_model: {path: b}, datasets: [{path: rows.jsonl}], eval_fraction: 0.5}")
        code, text = status(few)
        assert code == 0
        assert "warning: sft run would fail:" in text
        assert status(few, "--strict")[0] == 1
        assert status(few, "--strict", "--json")[0] == 1
        code, text = status(few, "--strict", "--recipe", str(recipe))
        assert (code, "warning" in text, "(eval_fraction 0.5)" in text) == (0, False, True)
        code, text = status(many, "--strict")
        assert (code, "warning" in text) == (0, False)
        code, text = status([*many, *({"input": "q", "output": ""} for _ in range(60))], "--strict")
        assert code == 1
        assert "60 of 960 rows (6.2%) cannot be used; max_quarantined_fraction allows 5.0%" in text

    def test_json(self, tmp_path):
        check(tmp_path, [{"messages": CHAT}, "7"])
        report = json.loads(run(str(tmp_path / "rows.jsonl"), "--json"))
        assert (report["rows_in"], report["rows_out"], report["map_fn"]) == (2, 1, "messages")
        assert report["quarantined"] == {"wrong_type": 1}
        assert report["ledger"]["turns"] == {"in": 1, "out": 1, "set_aside": {}}

    def test_it_needs_neither_prefect_nor_mlflow(self, tmp_path, monkeypatch):
        for name in ("prefect", "mlflow", "torch"):
            monkeypatch.setitem(sys.modules, name, None)
        check(tmp_path, [{"messages": CHAT}])
        assert "rows out: 1" in run(str(tmp_path / "rows.jsonl"))
