"""What map_fns read of a row: every column that carries context against every shipped map_fn, and what is counted."""

import json
from pathlib import Path

import pytest

from cli.data import _as_text
from sft_core.errors import RowError
from sft_core.normalize import MAP_FNS, CheckReport, check_dataset, to_conversation
from sft_core.normalize.reads import OF_FUNCTION, READS, check_columns, unread_columns
from sft_core.normalize.rows import convert_row
from sft_core.recipe import DatasetConfig

CHAT = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
SAID = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]
ROWS = {
    "alpaca": {"instruction": "I", "input": "x", "output": "O"},
    "alpaca_zh": {"instruction_zh": "I", "input_zh": "", "output_zh": "O"},
    "arxiv": {"abstract": "A", "title": "T"},
    "code_alpaca": {"prompt": "P", "completion": "C"},
    "colors": {"description": "D", "color": "C"},
    "crime_kg_assitant": {"input": "I", "output": "O"},
    "default": {"input": "I", "output": "O"},
    "dolly": {"instruction": "I", "context": "C", "response": "R"},
    "gsm8k": {"question": "Q", "answer": "A"},
    "law_reference": {"question": "Q", "answer": "A"},
    "medical": {"instruction": "I", "input": "x", "output": "O"},
    "messages": {"messages": CHAT},
    "msagent_react": {"conversations": [{"from": "user", "value": "A"}, {"from": "assistant", "value": "B"}]},
    "oasst1": {"text": "### Human: A### Assistant: B"},
    "openai": {"messages": CHAT},
    "openorca": {"system_prompt": "S", "question": "Q", "response": "R"},
    "pretrain": {"text": "T"},
    "prompt_completion": {"prompt": "P", "completion": "C"},
    "sharegpt": {"conversations": SAID},
    "sql": {"context": "C", "question": "Q", "answer": "A"},
    "squad": {"context": "C", "question": "Q", "answers": {"text": ["A"]}},
    "stack_exchange": {"question": "Q", "response": "R"},
    "tiny_codes": {"prompt": "P", "response": "R"},
    "wizardlm": {"conversations": SAID},
}
TOOLS = [{"name": "f"}]
CONTEXT = {
    "system": "S",
    "system_prompt": "S",
    "systemPrompt": "S",
    "history": [["a", "b"]],
    "images": ["a.png"],
    "image": {"bytes": "aa", "path": None},
    "videos": ["a.mp4"],
    "audios": ["a.wav"],
    "tools": TOOLS,
    "functions": json.dumps(TOOLS),
    "rejected_response": "R",
    "rejected": CHAT,
    "chosen": "C",
    "context": "C",
    "documents": ["d"],
    "chat_template_kwargs": {"enable_thinking": True},
}
THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thought", "chain_of_thought")
USED = {
    "messages": {"system", "system_prompt", "tools", "functions"},
    "sharegpt": {"system", "system_prompt", "tools", "functions"},
    "prompt_completion": {"system", "system_prompt", "tools", "functions"},
    "openai": {"system", "system_prompt"},
    "alpaca": {"system", "system_prompt", "history"},
    "openorca": {"system_prompt"},
    "dolly": {"context"},
    "sql": {"context"},
    "squad": {"context"},
}
FLAT = [name for name, entry in READS.items() if entry.flat]


class Recorded(dict):
    """A row that notes which of its columns are asked for."""

    def __init__(self, row: dict) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)


def reason(name: str, row: dict) -> str:
    with pytest.raises(RowError) as caught:
        convert_row(row, MAP_FNS[name])
    return caught.value.reason


def texts(name: str, row: dict) -> list[tuple]:
    return [(message["role"], message["content"]) for message in convert_row(row, MAP_FNS[name]).messages]


def test_every_shipped_map_fn_is_listed():
    assert set(ROWS) == set(READS) == set(MAP_FNS) == {name for name, _ in OF_FUNCTION.values()}


@pytest.mark.parametrize("name", MAP_FNS)
class TestEveryMapFn:
    def test_it_reads_what_it_declares_and_nothing_else(self, name):
        for row in (ROWS[name], {**CONTEXT, **ROWS[name]}, {"conversation": [{"output": "O"}]}):
            if not READS[name].fits({**row, **dict.fromkeys(ROWS[name])}) or not row.keys() & ROWS[name].keys():
                continue
            recorded = Recorded(row)
            try:
                MAP_FNS[name](recorded)
            except RowError:
                continue
            used = {column for column in recorded.asked if column in row}
            assert used <= READS[name].of(row)
            assert set(ROWS[name]) <= READS[name].of(row)

    def test_context_is_used_or_refused(self, name):
        plain = texts(name, ROWS[name])
        for column, value in CONTEXT.items():
            if column in ROWS[name]:
                continue
            row = {**ROWS[name], column: value}
            if column not in USED.get(name, ()):
                assert reason(name, row) == "unread_column", column
            elif column not in ("tools", "functions"):
                assert texts(name, row) != plain, column
            else:
                assert convert_row(row, MAP_FNS[name]).tools, column

    def test_columns_without_anything_in_them(self, name):
        unused = [column for column in (*CONTEXT, *THOUGHTS) if column not in USED.get(name, ())]
        for value in (None, "", " ", [], "[]", {}, [None], {"text": None}, False):
            row = {**dict.fromkeys(unused, value), **ROWS[name]}
            assert texts(name, row) == texts(name, ROWS[name]), value

    def test_thoughts_beside_a_plain_answer(self, name):
        for column in THOUGHTS:
            row = {**ROWS[name], column: "because"}
            if name in FLAT:
                assert reason(name, row) == "unread_column"
            else:
                assert texts(name, row) == texts(name, ROWS[name])

    def test_marks_of_the_row(self, name):
        row = ROWS[name]
        for column in ("weight", "train", "loss", "trainable", "loss_weight"):
            for value in (1, "true", 1.0, None):
                assert texts(name, {**row, column: value}) == texts(name, row)
            for value in (0, "False", "0.0"):
                assert reason(name, {**row, column: value}) == "all_weights_zero"
            for value in (0.5, "maybe", [1]):
                assert reason(name, {**row, column: value}) == "bad_mark"
        for other in ({"train_on_prompt": True}, {"mask_history": "false"}, {"loss_masks": [0, 1]}, {"mask": 1}):
            assert reason(name, {**row, **other}) == "bad_mark"
        for other in ({"mask": "User"}, {"weight_kg": 70.5}, {"training_set": "news"}, {"masks": None}):
            assert texts(name, {**row, **other}) == texts(name, row)

    def test_answers_that_were_judged_as_bad(self, name):
        for column in ("label", "kto_tag"):
            assert reason(name, {**ROWS[name], column: False}) == "unread_column"
            for value in (True, 0, "news", None):
                assert texts(name, {**ROWS[name], column: value}) == texts(name, ROWS[name])

    def test_what_a_question_is_about(self, name):
        for column in ("choices", "options", "passage", "article"):
            row = {**ROWS[name], column: ["a", "b"]}
            assert reason(name, row) == "unread_column" if name in FLAT else texts(name, row)

    def test_other_columns_are_counted(self, name):
        row = {"id": 7, "lang": "en", "note": "", "labels": [], **ROWS[name]}
        assert unread_columns(row, MAP_FNS[name]) == ["id", "lang"]


@pytest.mark.parametrize("name", ["default", "crime_kg_assitant"])
def test_an_instruction_beside_input_and_output(name):
    assert reason(name, {**ROWS["alpaca"]}) == "unread_column"


class TestWhatIsUsed:
    def test_history_and_system_of_alpaca(self):
        row = {"instruction": "I", "input": "x", "output": "O", "system": "S", "history": [["a", "b"], ["c", "d"]]}
        expected = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        expected += [("user", "I\nx"), ("assistant", "O")]
        assert texts("alpaca", row) == texts("alpaca", {**row, "history": json.dumps(row["history"])}) == expected
        assert [m["weight"] for m in convert_row(row, MAP_FNS["alpaca"]).messages[2::2]] == [1, 1, 1]

    @pytest.mark.parametrize(
        ("history", "expected"),
        [
            ([["a"]], "wrong_type"),
            ([["a", None]], "wrong_type"),
            (["a", "b"], "wrong_type"),
            ({"a": "b"}, "wrong_type"),
            ("a and b", "wrong_type"),
            (7, "wrong_type"),
            ([["a", " "]], "empty_answer"),
        ],
    )
    def test_history_that_cannot_be_read(self, history, expected):
        assert reason("alpaca", {**ROWS["alpaca"], "history": history}) == expected

    @pytest.mark.parametrize("name", ["messages", "openai", "sharegpt"])
    def test_system_beside_messages(self, name):
        column = "conversations" if name == "sharegpt" else "messages"
        row = ROWS[name]
        told = [{"role": "system", "content": "S"}, *CHAT]
        if name == "sharegpt":
            told = [{"from": "system", "value": "S"}, *SAID]
        expected = [("system", "S"), ("user", "A"), ("assistant", "B")]
        assert texts(name, {**row, "system": "S"}) == expected
        assert texts(name, {**row, "system_prompt": "S", "system": " "}) == expected
        assert texts(name, {column: told, "system": "S\n"}) == expected
        assert reason(name, {column: told, "system": "T"}) == "unread_column"
        assert reason(name, {**row, "system": "S", "system_prompt": "T"}) == "unread_column"
        assert reason(name, {**row, "system": ["S"]}) == "wrong_type"

    def test_leading_answers_are_skipped_with_a_system_too(self):
        row = {"messages": [CHAT[1], *CHAT], "system": "S"}
        assert texts("openai", row) == [("system", "S"), ("user", "A"), ("assistant", "B")]

    def test_tools_and_functions_that_differ(self):
        assert reason("messages", {"messages": CHAT, "tools": TOOLS, "functions": [{"name": "g"}]}) == "unread_column"

    @pytest.mark.parametrize("answers", [["A"], ["A", "B"], "A", {"text": ["A"], "answer_start": [3]}])
    def test_answers_of_squad(self, answers):
        row = {"id": 1, "title": "T", "context": "C", "question": "Q", "answers": answers}
        assert texts("squad", row) == [("user", "C\n\nQ"), ("assistant", "A")]

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [({"text": []}, "empty_answer"), ([], "empty_answer"), (None, "null_value"), ([1], "wrong_type")],
    )
    def test_questions_without_an_answer(self, answers, expected):
        assert reason("squad", {"context": "C", "question": "Q", "answers": answers}) == expected


class TestPromptCompletion:
    """TRL's dataset formats: plain and conversational."""

    def both(self, prompt: object, completion: object, **columns: object) -> list[tuple]:
        row = {"prompt": prompt, "completion": completion, **columns}
        messages = convert_row(row, MAP_FNS["prompt_completion"]).messages
        return [(message["role"], message["content"], message["weight"]) for message in messages]

    def test_messages(self):
        prompt, completion = [*CHAT, {"role": "user", "content": "C"}], [{"role": "assistant", "content": "D"}]
        expected = [("user", "A", None), ("assistant", "B", 0), ("user", "C", None), ("assistant", "D", 1)]
        assert self.both(prompt, completion) == expected
        assert self.both(json.dumps(prompt), json.dumps(completion)) == expected
        assert self.both(prompt, "D") == expected
        assert self.both("C", completion) == expected[2:]
        assert self.both(prompt, completion, system="S") == [("system", "S", None), *expected]

    def test_texts(self):
        assert self.both("P", "C") == [("user", "P", None), ("assistant", "C", 1)]
        assert self.both("P", "C", system="S")[0] == ("system", "S", None)
        answer = json.dumps(CHAT)  # a text that happens to be messages
        assert self.both("P", answer) == [("user", "P", None), ("assistant", answer, 1)]
        row = {"prompt": "P", "response": "R", "tools": TOOLS}
        assert convert_row(row, MAP_FNS["prompt_completion"]).tools

    def test_faults(self):
        marked = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B", "weight": 1}]
        rows = {
            "bad_mark": {"prompt": marked, "completion": [CHAT[1]]},
            "no_assistant_turn": {"prompt": CHAT, "completion": [CHAT[0]]},
            "wrong_type": {"prompt": 7, "completion": "C"},
            "empty_answer": {"prompt": CHAT, "completion": " "},
            "missing_column": {"prompt": CHAT},
        }
        assert {expected: reason("prompt_completion", row) for expected, row in rows.items()} == {
            expected: expected for expected in rows
        }


def check(tmp_path: Path, rows: list, map_fn: str | None = None) -> CheckReport:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return check_dataset(DatasetConfig(path=str(tmp_path / "rows.jsonl")), map_fn)


class TestReport:
    def test_unread_columns_and_added_prompts_are_listed(self, tmp_path):
        rows = [{"prompt": f"P{n}", "response": f"R{n}", "id": n + 1, "note": "x" * (n > 6)} for n in range(9)]
        report = check(tmp_path, rows, "tiny_codes")
        assert report.unread_columns == {"id": 9, "note": 2}
        assert report.adds_system.startswith("You are a professional programer.")
        text = _as_text("rows.jsonl", report)
        assert "columns that this map_fn does not read: id (9 rows), note (2 rows)" in text
        assert "system prompt that this map_fn adds to every row: You are a professional programer." in text
        chosen = check(tmp_path, rows)
        assert (chosen.map_fn, chosen.adds_system, chosen.rows_out) == ("prompt_completion", "", 9)

    def test_the_one_that_understands_most_is_chosen(self, tmp_path):
        rows = [{"messages": CHAT, "tools": TOOLS}] * 3 + [{"messages": CHAT, "images": ["a"]}]
        report = check(tmp_path, rows)
        assert (report.map_fn, report.fitting) == ("messages", {"messages": 3, "openai": 0})
        assert report.quarantined == {"unread_column": 1}
        assert "'images' is not read by messages" in report.examples["unread_column"]["detail"]
        marked = [*CHAT[:1], {**CHAT[1], "train": False}, *CHAT]
        assert check(tmp_path, [{"messages": marked}] * 2).fitting == {"messages": 2, "openai": 2}
        odd = [{**CHAT[0]}, {**CHAT[1], "train": 0.5}]
        assert check(tmp_path, [{"messages": odd}] * 2).fitting == {"messages": 0, "openai": 0}

    def test_of_a_map_fn_of_ones_own_nothing_is_claimed(self, tmp_path):
        (tmp_path / "mine.py").write_text("def read(row):\n    return {'text': row['q']}\n")
        report = check(tmp_path, [{"q": "x", "images": ["a"], "weight": 0.5}], f"{tmp_path / 'mine.py'}:read")
        assert (report.rows_out, report.unread_columns, report.adds_system) == (1, {}, "")
        check_columns({"images": ["a"]}, dict)

    def test_names_of_any_kind(self, tmp_path):
        rows = [{"input": f"{n}", "output": "O", "\ud800": n + 1, "\x1b[2J\n": "x", f"k{n}" * 40: 1} for n in range(60)]
        report = check(tmp_path, rows, "default")
        assert len(report.unread_columns) == 50
        assert report.unread_columns["\\ud800"] == 60
        assert report.unread_columns["\\x1b[2J\\n"] == 60
        assert max(map(len, report.unread_columns)) == 60


class TestWhatAMapFnReturns:
    def test_tools_beside_turns(self):
        turns = [{"input": "A", "output": "B"}]
        assert to_conversation({"conversation": turns, "tools": TOOLS}).tools
        with pytest.raises(RowError, match="bad_conversation: plain text has no place for tools"):
            to_conversation({"text": "T", "tools": TOOLS})

    @pytest.mark.parametrize("returned", [{"messages": CHAT}, {"conversation": [{"output": "B"}]}, {"text": "T"}])
    def test_marks_beside_it(self, returned):
        assert to_conversation({**returned, "weight": 1, "id": 7, "weight_kg": 0.5}).messages
        for marks, expected in (({"weight": 0}, "all_weights_zero"), ({"train": "x"}, "bad_mark")):
            with pytest.raises(RowError, match=expected):
                to_conversation({**returned, **marks})


def test_a_shipped_one_called_by_a_user_s_own_still_reads_marks():
    row = {"messages": [CHAT[0], {**CHAT[1], "train": 0}, *CHAT]}
    assert [m["weight"] for m in to_conversation(MAP_FNS["messages"](row)).messages] == [None, 0, None, 1]
