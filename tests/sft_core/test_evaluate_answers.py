"""Scores of answers: ROUGE-L in any script, the user's scorer, tasks of lm-evaluation-harness."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sft_core.errors import DataError, RecipeError
from sft_core.evaluate import EvaluatedModel, evaluate_model, harness, harness_parts, read_report, scorer_source
from sft_core.evaluate.answers import behind_thought, load_scorer, rouge_l, score_answer
from sft_core.evaluate.harness import run_harness
from sft_core.evaluate.scorer import open_scorer
from sft_core.pack import load_chat_template
from sft_core.recipe import EvaluateConfig

MESSAGES = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi"}]
SCORER = """
def share(messages, reference, answer):
    return len(answer) / TARGET + 0 * len(messages)

TARGET = 10
"""


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "The cat, SAT!", 1.0),
        ("the cat sat on the mat", "the cat on a mat", 8 / 11),  # 4 in common of 6 and 5
        ("我爱北京", "我爱上海", 0.5),  # 2 in common of 4 and 4
        ("naïve Füße", "füße", 2 / 3),
        ("您好 world", "world", 0.5),  # 1 in common of 3 and 1
        ("!!", "!!", 1.0),
        ("!!", "??", 0.0),
        ("yes", "", 0.0),
        ("", behind_thought("\u200b"), 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(reference: str, answer: str, expected: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(expected)


@pytest.fixture
def scorer_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCORER)
    return path


def test_a_scorer_is_a_function_of_the_users(scorer_file: Path) -> None:
    scorer = load_scorer(f"{scorer_file}:share")
    assert score_answer(scorer, "r", MESSAGES, "hello") == 0.5


def test_a_scorers_source_is_its_code_with_what_it_uses(scorer_file: Path) -> None:
    name = f"{scorer_file}:share"
    before = scorer_source(name)
    scorer_file.write_text(SCORER + "# a comment\n")
    assert scorer_source(name) == before
    scorer_file.write_text(SCORER.replace("TARGET = 10", "TARGET = 20"))
    assert scorer_source(name) != before
    assert scorer_source(None) is None


@pytest.mark.parametrize(("name", "message"), [("alpaca", "write package.module"), ("nothere.py:f", "no file nothere")])
def test_a_scorer_that_is_not_there_names_the_key(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^evaluate.scorer '{name}': .*{message}"):
        load_scorer(name)


@pytest.mark.parametrize("value", ["'text'", "None", "float('nan')", "1 / 0"])
def test_a_scorer_that_returns_no_number_fails_with_the_row(tmp_path: Path, value: str) -> None:
    (tmp_path / "bad.py").write_text(f"def f(messages, reference, answer):\n    return {value}\n")
    with pytest.raises(DataError, match=r"^evaluate.scorer: row r7: "):
        score_answer(load_scorer(f"{tmp_path / 'bad.py'}:f"), "r7", MESSAGES, "a")


HOSTILE = {
    "import sys; sys.exit('enough')": "row r7: SystemExit: enough; it must return a number",
    "import os; os._exit(3)": r"row r7: its process ended \(exit code 3\)",
    "import os; os.kill(os.getpid(), 11)": r"row r7: its process ended \(exit code -11\)",
    "raise KeyboardInterrupt": "row r7: KeyboardInterrupt: ; it must return a number",
    "while True: pass": "row r7: no answer from it after 2 s, and it was ended",
    "import re; re.match('(a|a)*b', 'a' * 60)": "row r7: no answer from it after 2 s, and it was ended",
    "raise ValueError('one' + chr(10) + 'two')": "row r7: ValueError: one two; it must return a number",
}


@pytest.mark.parametrize("body", HOSTILE)
def test_whatever_a_scorer_does_is_one_error_that_names_the_row(tmp_path: Path, body: str) -> None:
    (tmp_path / "bad.py").write_text(f"def f(messages, reference, answer):\n    {body}\n")
    with (
        pytest.raises(DataError, match=f"^evaluate.scorer: {HOSTILE[body]}") as raised,
        open_scorer(f"{tmp_path / 'bad.py'}:f", seconds=2.0) as score,
    ):
        score("r7", MESSAGES, "a")
    assert "\n" not in str(raised.value)


def test_a_scorer_that_cannot_be_loaded_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(1)\n")
    with (
        pytest.raises(RecipeError, match=r"^evaluate.scorer '.*bad.py:f': .*does not run: SystemExit: 1"),
        open_scorer(f"{tmp_path / 'bad.py'}:f"),
    ):
        pass


def test_a_scorer_keeps_what_it_has_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("calls = []\ndef f(*_):\n    calls.append(1)\n    return len(calls)\n")
    with open_scorer(f"{tmp_path / 'mine.py'}:f") as score:
        assert [score("r", MESSAGES, "a") for _ in range(3)] == [1.0, 2.0, 3.0]


def test_scores_of_the_users_are_kept_by_row_and_averaged(
    tiny_model: Path, tmp_path: Path, scorer_file: Path, write_conversations: Callable[..., Path]
) -> None:
    config = EvaluateConfig(max_new_tokens=4, max_generated_rows=2, scorer=f"{scorer_file}:share")
    model = EvaluatedModel(folder=tiny_model, max_length=128, chat_template=load_chat_template("chatml"))
    evaluate_model(model, write_conversations(tmp_path / "c", 0, 5), config, 1, tmp_path / "out")
    report = read_report(tmp_path / "out")
    scores = [score.score for score in report.scores if score.answer is not None]
    assert scores == [len(score.answer) / 10 for score in report.scores if score.answer is not None]
    assert report.metrics()["score"] == pytest.approx(sum(scores) / 2)
    assert [score.score for score in report.scores if score.answer is None] == [None] * 3


def test_a_score_as_primary_metric_needs_a_scorer() -> None:
    with pytest.raises(ValueError, match="set evaluate.scorer"):
        EvaluateConfig(primary_metric="score")


@pytest.mark.slow
def test_a_task_file_of_ones_own_runs_offline(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"say w{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: my_letters\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\n"
    )
    tasks = (str(tmp_path / "mine.yaml"),)
    figures = run_harness(tiny_model, EvaluateConfig(harness_tasks=tasks, harness_limit=4))
    assert 0 <= figures["my_letters/acc"] <= 1
    parts = harness_parts(tasks)
    assert parts["tasks"] == ["my_letters"]
    (tmp_path / "rows.jsonl").write_text("")
    assert harness_parts(tasks) != parts


def test_without_the_extra_the_error_names_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "lm_eval", None)  # its import fails as that of a package that is not there
    monkeypatch.setattr(harness, "version", nowhere)
    with pytest.raises(RecipeError, match=r"pip install 'sft-flows\[harness\]'"):
        run_harness(tiny_model, EvaluateConfig(harness_tasks=("arc_easy",)))
    with pytest.raises(RecipeError, match=r"pip install 'sft-flows\[harness\]'"):
        harness_parts(("arc_easy",))
