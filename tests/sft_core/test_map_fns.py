"""The shipped map_fns: XTuner's values on well-formed rows, and the differences meant to be there."""

import doctest

import pytest

from sft_core.errors import RowError
from sft_core.normalize import (
    MAP_FNS,
    columns,
    content,
    load_map_fn,
    map_fn_source,
    map_fns,
    reads,
    suggest_map_fns,
    tool_calls,
)

CODER = "You are a professional programer. Please provide the corresponding code based on the description of Human.\n"
MEDICAL = "如果你是一名医生，请根据患者的描述回答医学问题。\n"


def system(content: object) -> dict:
    return {"role": "system", "content": content}


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object, **keys: object) -> dict:
    return {"role": "assistant", "content": content, **keys}


def turns(name: str, row: dict) -> list[dict]:
    returned = MAP_FNS[name](row)
    assert list(returned) == ["conversation"]
    return returned["conversation"]


def reason(name: str, row: dict) -> str:
    with pytest.raises(RowError) as caught:
        MAP_FNS[name](row)
    return caught.value.reason


def test_all_of_xtuner_and_ours():
    xtuner = "alpaca alpaca_zh arxiv code_alpaca colors crime_kg_assitant default law_reference medical msagent_react "
    xtuner += "oasst1 openai openorca pretrain sql stack_exchange tiny_codes wizardlm"
    assert set(MAP_FNS) == {*xtuner.split(), "dolly", "gsm8k", "messages", "prompt_completion", "sharegpt", "squad"}
    assert set(reads.READS) == set(MAP_FNS)
    assert all(">>>" in function.__doc__ for function in MAP_FNS.values())
    for module in (columns, content, reads, tool_calls, map_fns.dialogues, map_fns.msagent, map_fns.one_turn):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 0) == (0, True), module


def test_names_as_xtuner_writes_them():
    for name in ("crime_kg_assitant", "crime_kg_assitan", "crime_kg_assistant", "crime_kg_assitant_map_fn"):
        assert load_map_fn(name) is MAP_FNS["crime_kg_assitant"]
        assert map_fn_source(name)["name"] == "crime_kg_assitant"


@pytest.mark.parametrize(
    ("name", "row", "turn"),
    [
        ("alpaca", {"instruction": "I", "input": "x", "output": " O "}, {"input": "I\nx", "output": " O "}),
        ("alpaca", {"instruction": "I", "input": "", "output": "O"}, {"input": "I\n", "output": "O"}),
        ("alpaca_zh", {"instruction_zh": "I", "input_zh": "x", "output_zh": "O"}, {"input": "I\nx", "output": "O"}),
        ("code_alpaca", {"prompt": "P", "completion": "C"}, {"system": CODER, "input": "P", "output": "C"}),
        ("tiny_codes", {"prompt": "P", "response": "\tR"}, {"system": CODER, "input": "P", "output": "\tR"}),
        (
            "medical",
            {"instruction": "I", "input": "", "output": "O"},
            {"system": MEDICAL, "input": "I\n", "output": "O"},
        ),
        ("default", {"input": "I", "output": "#### 7"}, {"input": "I", "output": "#### 7"}),
    ],
)
def test_one_turn(name, row, turn):
    assert turns(name, row) == [turn]
    assert turns(name, {**row, "id": 1}) == [turn]


@pytest.mark.parametrize("name", ["alpaca", "medical"])
@pytest.mark.parametrize("row", [{}, {"input": None}])
def test_no_input_is_an_empty_one_and_never_the_text_none(name, row):
    assert turns(name, {"instruction": "I", "output": "O", **row})[0]["input"] == "I\n"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("alpaca", "output"),
        ("alpaca_zh", "output_zh"),
        ("medical", "output"),
        ("code_alpaca", "completion"),
        ("tiny_codes", "response"),
        ("default", "output"),
    ],
)
def test_faults_of_an_answer(name, column):
    row = dict.fromkeys(["instruction", "input", "instruction_zh", "input_zh", "prompt", "output"], "x") | {column: "y"}
    assert turns(name, row)[0]["output"] == "y"
    assert reason(name, {key: value for key, value in row.items() if key != column}) == "missing_column"
    assert reason(name, row | {column: None}) == "null_value"
    assert reason(name, row | {column: ["y"]}) == "wrong_type"
    assert reason(name, row | {column: " \n"}) == "empty_answer"


@pytest.mark.parametrize("value", [None, 1, ["x"]])
def test_faults_of_a_request(value):
    assert reason("default", {"input": value, "output": "O"}) == ("wrong_type" if value else "null_value")
    assert reason("alpaca", {"instruction": value, "output": "O"}) == ("wrong_type" if value else "null_value")


class TestOasst1:
    @pytest.mark.parametrize(
        "text",
        [
            "### Human: A### Assistant: B### Human: C### Assistant: D",
            "### Human: A ### Assistant: B ### Human: C ### Assistant: D\n",
            "### Human: A\n### Assistant: B\n### Human: C\n### Assistant: D### Human: E",
            "###Human:A\n###Assistant:B###  Human:C###  Assistant: D ### Human: E ### Assistant:",
        ],
    )
    def test_two_turns(self, text):
        assert turns("oasst1", {"text": text}) == [{"input": "A", "output": "B"}, {"input": "C", "output": "D"}]

    @pytest.mark.parametrize("answer", ["Do:\n### Step 1\nGo.", "use #### and ###", "a&###; b", "#### Human: no turn"])
    def test_other_marks_stay_in_the_answer(self, answer):
        assert turns("oasst1", {"text": f"### Human: A### Assistant: {answer}"}) == [{"input": "A", "output": answer}]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("### Human: A### Human: B### Assistant: C", "bad_turn_order"),
            ("### Assistant: A### Human: B### Assistant: C", "bad_turn_order"),
            ("### Human: A### Assistant: B### Assistant: C", "bad_turn_order"),
            ("Be kind.### Human: A### Assistant: B", "bad_turn_order"),
            ("### Human: A### Assistant: ### Human: B### Assistant: C", "empty_answer"),
            ("### Human: A", "empty_answer"),
            ("### Human: A ### Assistant:", "empty_answer"),
            ("table: 1-1\nQ: how many?", "no_turns"),
            ("", "no_turns"),
            (None, "null_value"),
            (["### Human: A"], "wrong_type"),
        ],
    )
    def test_faults(self, text, expected):
        assert reason("oasst1", {"text": text}) == expected

    def test_missing_column_names_those_that_are_there(self):
        with pytest.raises(RowError, match="missing_column: no column 'text'; there are input, output"):
            MAP_FNS["oasst1"]({"output": "O", "input": "I"})


class TestOpenai:
    def outputs(self, *messages: dict) -> list[tuple]:
        return [tuple(turn.values()) for turn in turns("openai", {"messages": list(messages)})]

    def test_system_goes_with_the_next_answer_only(self):
        got = self.outputs(system("S"), user("A"), assistant("B"), user("C"), assistant("D"))
        assert got == [("S", "A", "B", True), ("", "C", "D", True)]

    def test_users_in_a_row_are_joined_without_a_separator(self):
        assert self.outputs(user("A"), user("B"), assistant("C")) == [("", "AB", "C", True)]

    def test_leading_answers_are_skipped_and_a_last_request_dropped(self):
        got = self.outputs(assistant("X"), assistant("Y"), user("A"), assistant("B"), user("C"))
        assert got == [("", "A", "B", True)]

    def test_system_then_answer(self):
        assert self.outputs(system("S"), assistant("B")) == [("S", "", "B", True)]

    def test_text_parts_are_joined(self):
        parts = [{"type": "text", "text": "A"}, {"type": "text", "value": "B"}]
        assert self.outputs(user(parts), assistant(parts)) == [("", "AB", "AB", True)]

    def test_systems_in_a_row_are_both_kept(self):
        assert self.outputs(system("S"), system("T"), user("A"), assistant("B")) == [("S\nT", "A", "B", True)]

    @pytest.mark.parametrize(
        ("keys", "trained"),
        [
            ({}, True),
            ({"loss": None}, True),
            ({"loss": True}, True),
            ({"loss": "True"}, True),
            ({"loss": False}, False),
            ({"loss": "False"}, False),
            ({"weight": 0}, False),
            ({"weight": 1, "loss": None}, True),
        ],
    )
    def test_loss_on_one_message_leaves_the_others_alone(self, keys, trained):
        got = self.outputs(user("A"), assistant("B", **keys), user("C"), assistant("D"))
        assert [turn[3] for turn in got] == [trained, True]

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([user("A")], "no_assistant_turn"),
            ([assistant("A")], "no_assistant_turn"),
            ([], "no_turns"),
            (None, "null_value"),
            ("A", "wrong_type"),
            (["A"], "wrong_type"),
            ([user("A"), {"role": "tool", "content": "B"}], "unknown_role"),
            ([{"content": "A"}], "unknown_role"),
            ([user("A"), {"role": "assistant", "tool_calls": [{}]}], "tool_calls"),
            ([user("A"), {"role": "assistant"}], "missing_column"),
            ([user("A"), assistant(None)], "null_value"),
            ([user([{"type": "text"}]), assistant("B")], "missing_column"),
            ([user([{"type": "image_url"}]), assistant("B")], "content_part"),
            ([user(["A"]), assistant("B")], "wrong_type"),
            ([user("A"), assistant("")], "empty_answer"),
        ],
    )
    def test_faults(self, messages, expected):
        assert reason("openai", {"messages": messages}) == expected
        assert reason("openai", {"text": "A"}) == "missing_column"


def test_default_passes_the_common_format_on():
    conversation = [{"input": "I", "output": "O"}]
    assert turns("default", {"conversation": conversation}) == conversation
    assert turns("default", {"conversation": conversation, "input": "A", "output": "B"}) == [
        {"input": "A", "output": "B"}
    ]


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ("instruction input output", ("alpaca", "medical", "default", "crime_kg_assitant")),
        ("instruction_zh input_zh output_zh", ("alpaca_zh",)),
        ("text lang", ("oasst1", "pretrain")),
        ("messages tools", ("messages", "openai")),
        ("prompt completion", ("prompt_completion", "code_alpaca")),
        ("prompt response", ("prompt_completion", "tiny_codes")),
        ("conversation", ("default",)),
        ("conversations", ("sharegpt", "wizardlm", "msagent_react")),
        ("instruction context response category", ("dolly",)),
        ("question answer", ("gsm8k", "law_reference")),
        ("context question answer", ("squad", "gsm8k", "law_reference")),
        ("id title context question answers", ("squad",)),
        ("id system_prompt question response", ("openorca", "stack_exchange")),
        ("abstract title", ("arxiv",)),
        ("description color", ("colors",)),
        ("context answer aliases", ()),
    ],
)
def test_suggestions(columns, names):
    assert suggest_map_fns(dict.fromkeys(columns.split())) == names


def test_sql_is_suggested_for_tables_only():
    row = {"context": "CREATE TABLE t (a INT)", "question": "How many?", "answer": "SELECT COUNT(*) FROM t"}
    assert suggest_map_fns(row)[:2] == ("sql", "squad")
    assert suggest_map_fns({**row, "context": "Ann ran."})[0] == "squad"
