"""The map_fns beyond the tutorial's eight: values of XTuner v0.2.0's own functions, and faults."""

import json

import pytest

from sft_core.errors import RowError
from sft_core.normalize import MAP_FNS, to_messages

ARXIV = (
    "If you are an expert in writing papers, please generate a good paper title for this paper based on other authors' "
    "descriptions of their abstracts.\n"
)
COLORIST = "You are a professional color designer. Please provide the corresponding colors based on the description of "
COLORIST += "Human.\n"
LAWYER = "你现在是一名专业的中国律师，请根据用户的问题给出准确、有理有据的回复。\n"
SQL = (
    "If you are an expert in SQL, please generate a good SQL Query for Question based on the CREATE TABLE statement.\n"
)
COLUMNS = {
    "arxiv": ("abstract", "title"),
    "colors": ("description", "color"),
    "crime_kg_assitant": ("input", "output"),
    "law_reference": ("question", "answer"),
    "openorca": ("question", "response"),
    "sql": ("question", "answer"),
    "stack_exchange": ("question", "response"),
    "dolly": ("instruction", "response"),
    "gsm8k": ("question", "answer"),
}


def turns(name: str, row: dict) -> list[dict]:
    returned = MAP_FNS[name](row)
    assert list(returned) == ["conversation"]
    return returned["conversation"]


def reason(name: str, row: dict) -> str:
    with pytest.raises(RowError) as caught:
        MAP_FNS[name](row)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "row", "turn"),
    [
        ("arxiv", {"abstract": "A\n", "title": " T"}, {"system": ARXIV, "input": "A\n", "output": " T"}),
        ("colors", {"description": "S: a: b ", "color": "#f"}, {"system": COLORIST, "input": "a: b", "output": "#f"}),
        ("colors", {"description": " sky", "color": "#f"}, {"system": COLORIST, "input": "sky", "output": "#f"}),
        ("crime_kg_assitant", {"input": "I", "output": "O"}, {"system": LAWYER, "input": "I", "output": "O"}),
        ("law_reference", {"question": "Q", "answer": "A"}, {"system": LAWYER, "input": "Q", "output": "A"}),
        (
            "openorca",
            {"system_prompt": "", "question": "Q", "response": "R"},
            {"system": "", "input": "Q", "output": "R"},
        ),
        (
            "openorca",
            {"system_prompt": None, "question": "Q", "response": "R"},
            {"system": "", "input": "Q", "output": "R"},
        ),
        ("pretrain", {"text": " T\n"}, {"input": "", "output": "T", "need_eos_token": False}),
        (
            "sql",
            {"context": "C {x}", "question": "Q", "answer": "A"},
            {"system": SQL, "input": "C {x}\nQ", "output": "A"},
        ),
        ("stack_exchange", {"question": "Q", "response": "R"}, {"input": "Q", "output": "R"}),
        ("dolly", {"instruction": "I", "context": " ", "response": "R"}, {"input": "I", "output": "R"}),
        ("gsm8k", {"question": "Q", "answer": "#### 7"}, {"input": "Q", "output": "#### 7"}),
    ],
)
def test_one_turn(name, row, turn):
    (got,) = turns(name, {**row, "id": 1})
    assert (got, list(got)) == (turn, list(turn))
    assert to_messages({"conversation": [got]})[-1]["content"] == turn["output"]


@pytest.mark.parametrize(("name", "columns"), COLUMNS.items())
def test_faults_of_one_turn(name, columns):
    request, answer = columns
    row = {"context": "C", "system_prompt": "S", request: "x", answer: "y"}
    assert turns(name, row)[0]["output"] == "y"
    for column in columns:
        assert reason(name, {key: value for key, value in row.items() if key != column}) == "missing_column"
        assert reason(name, row | {column: None}) == "null_value"
        assert reason(name, row | {column: ["y"]}) == "wrong_type"
    assert reason(name, row | {answer: " \n"}) == "empty_answer"


def said(who: object, value: object) -> dict:
    return {"from": who, "value": value}


class TestWizardlm:
    def test_as_xtuner(self):
        spoken = ["gpt", "human", "human", "gpt", "gpt", "human"]
        row = {"conversations": [said(who, "xabcde"[place]) for place, who in enumerate(spoken)]}
        assert turns("wizardlm", row) == [{"input": "ab", "output": "c"}, {"input": "", "output": "d"}]

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([said("human", "A")], "no_assistant_turn"),
            ([said("gpt", "A")], "no_assistant_turn"),
            ([said("system", "S"), said("human", "A"), said("gpt", "B")], "unknown_role"),
            ([said("human", "A"), said("gpt", "")], "empty_answer"),
            ([said("human", None), said("gpt", "B")], "null_value"),
            ([], "no_turns"),
            ("A", "wrong_type"),
        ],
    )
    def test_faults(self, messages, expected):
        assert reason("wizardlm", {"conversations": messages}) == expected
        assert reason("wizardlm", {}) == "missing_column"


class TestMsagentReact:
    CALL = 'so <|startofthink|>```JSON\n{"api_name": "w", "parameters": {"city": "北京"}}```<|endofthink|>'
    RUN = '<|startofexec|>```JSON\n{"t": 20, "ok": true}\n```<|endofexec|>It is 20.'
    TOOLS = 'x {"name": "w", "description": "d", "paths": [{"parameters": [{"name": "city", "description": "c"}]}]} {'
    ROW = (said("system", TOOLS), said("user", "W?"), said("assistant", CALL + RUN))

    def test_as_xtuner(self):
        for messages in (list(self.ROW), repr(list(self.ROW))):
            called, answered = turns("msagent_react", {"conversations": messages})
            assert called.pop("system") == (
                "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{'w': \"d\\n输入参数: {'city': 'c'}\"}\n"
                "如果使用工具请遵循以下格式回复：\n```\nThought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
                "Action:工具名称，你的工具必须从 [['w']] 选择\nAction Input:工具输入参数\n```\n"
                "工具返回按照以下格式回复："
                "\n```\nResponse:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
                "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
            )
            assert called == {"input": "W?\n", "output": "Thought:so\nAction:w\nAction Input:{'city': '北京'}\n\n"}
            assert answered == {
                "system": "Response:{'t': 20, 'ok': True}\n",
                "output": "Final Answer:It is 20.\n",
            }

    def test_a_string_is_never_run(self, tmp_path):
        trap = tmp_path / "trap"
        text = f"[__import__('pathlib').Path({str(trap)!r}).touch()]"
        assert reason("msagent_react", {"conversations": text}) == "wrong_type"
        assert not trap.exists()

    @pytest.mark.filterwarnings("error")
    def test_strings_of_both_kinds(self):
        for text in (
            r"[{'from': 'user', 'value': '\d'}, {'from': 'assistant', 'value': 'B'}]",
            json.dumps([said("user", "\\d") | {"id": None}, said("assistant", "B")]),
        ):
            assert turns("msagent_react", {"conversations": text})[0]["input"] == "\\d\n"

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("<|startofthink|>{broken}<|endofthink|>", "tool_calls"),
            ("<|startofthink|>{}<|endofthink|>", "tool_calls"),
            ("<|startofthink|>never closed", "tool_calls"),
            (CALL + "<|startofexec|>{broken}<|endofexec|>x", "tool_calls"),
            (CALL + "<|startofexec|>{}", "tool_calls"),
            (CALL + RUN + RUN, "tool_calls"),
            (RUN, "empty_answer"),
            (" ", "empty_answer"),
        ],
    )
    def test_what_xtuner_drops_or_garbles_is_set_aside(self, answer, expected):
        assert reason("msagent_react", {"conversations": [said("user", "W?"), said("assistant", answer)]}) == expected

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([said("user", "A")], "no_turns"),
            ([said("user", "A"), said("user", "B")], "no_assistant_turn"),
            ([said("user", "A"), said("gpt", "B")], "unknown_role"),
            ("[" * 5000, "wrong_type"),
            ("{'a': 1}", "wrong_type"),
            (None, "null_value"),
        ],
    )
    def test_faults(self, messages, expected):
        assert reason("msagent_react", {"conversations": messages}) == expected
