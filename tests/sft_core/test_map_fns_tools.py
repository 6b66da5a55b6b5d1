"""Tool calls, tool messages and tools: from the rows of OpenAI, HF and ShareGPT to what the store holds."""

import json

import pytest

from sft_core.errors import RowError
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.normalize import (
    CONVERSATION_SCHEMA,
    MAP_FNS,
    NormalizeSource,
    content_digest,
    normalize_dataset,
    to_conversation,
    to_messages,
)
from sft_core.recipe import DatasetConfig, NormalizeConfig

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 1, "a": "é"}'}}
STORED = '[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": "é"}}}]'
CHAT_ANSWER = {"role": "assistant", "content": "B"}
TOOL = {"name": "add", "parameters": {"type": "object"}}
OPENAI = {
    "messages": [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "A"}], "name": "ann"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "B", "tool_calls": None},
        {"role": "tool", "content": "left out"},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}


def said(who: str, value: object, **keys: object) -> dict:
    return {"from": who, "value": value, **keys}


def reason(name: str, row: dict) -> str:
    with pytest.raises(RowError) as caught:
        to_conversation(MAP_FNS[name](row))
    return caught.value.reason


def test_messages_with_tools():
    conversation = to_conversation(MAP_FNS["messages"](OPENAI))
    assert conversation.messages == [
        {"role": "system", "content": "S", "weight": None},
        {"role": "user", "content": "A", "weight": None, "name": "ann"},
        {"role": "assistant", "content": "", "weight": 1, "tool_calls": STORED},
        {"role": "tool", "content": "2", "weight": None, "name": "add", "tool_call_id": "c1"},
        {"role": "assistant", "content": "B", "weight": 1},
    ]
    assert json.loads(conversation.tools) == [{"type": "function", "function": TOOL}]


def test_the_older_function_call():
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "B"},
    ]
    conversation = to_conversation(MAP_FNS["messages"]({"messages": messages, "functions": [{"name": "f"}]}))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(conversation.messages[1]["tool_calls"]) == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]
    assert conversation.tools == '[{"type": "function", "function": {"name": "f"}}]'


@pytest.mark.parametrize(
    ("keys", "weight"), [({}, 1), ({"weight": 0}, 0), ({"loss": "False"}, 0), ({"loss": None, "weight": None}, 1)]
)
def test_messages_weight(keys, weight):
    answers = [{"role": "assistant", "content": "B", **keys}, {"role": "assistant", "content": "C"}]
    got = to_messages(MAP_FNS["messages"]({"messages": answers}))
    assert [message["weight"] for message in got] == [weight, 1]


def test_sharegpt_with_tools():
    row = {
        "system": "S",
        "tools": json.dumps([TOOL]),
        "conversations": [
            said("gpt", "skipped"),
            said("human", "A"),
            said("function_call", '{"name": "add", "arguments": {"a": 1}}'),
            said("observation", "2"),
            {"role": "assistant", "content": "B", "weight": 0},
            said("user", "C"),
            said("gpt", "D"),
        ],
    }
    conversation = to_conversation(MAP_FNS["sharegpt"](row))
    assert [(m["role"], m["content"], m["weight"]) for m in conversation.messages] == [
        ("system", "S", None),
        ("user", "A", None),
        ("assistant", "", 1),
        ("tool", "2", None),
        ("assistant", "B", 0),
        ("user", "C", None),
        ("assistant", "D", 1),
    ]
    assert json.loads(conversation.messages[2]["tool_calls"])[0]["function"]["arguments"] == {"a": 1}
    assert json.loads(conversation.tools) == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("human", "A"), said("critic", "B")], "unknown_role"),
        ([said("human", "A"), said("gpt", " ")], "empty_answer"),
        ([said("human", "A"), said("gpt", None)], "null_value"),
        ([said("human", "A"), said("function_call", "{broken")], "tool_calls"),
        ([said("human", "A"), said("function_call", "7")], "tool_calls"),
        ([said("human", "A"), said("function_call", "{}"), said("gpt", "B")], "empty_answer"),
        ([said("human", "A"), said("function_call", '{"arguments": {}}')], "tool_calls"),
        ([said("human", "A")], "no_assistant_turn"),
        ([{"from": "human"}, said("gpt", "B")], "missing_column"),
    ],
)
def test_faults_of_sharegpt(messages, expected):
    assert reason("sharegpt", {"conversations": messages}) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"tools": "{broken"},
        {"tools": 7},
        {"tools": [7]},
        {"tools": [{"description": "no name"}]},
        {"tools": [{"name": "f", "x": float("nan")}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_call"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]}]},
    ],
)
def test_calls_and_tools_that_cannot_be_read(row):
    assert reason("messages", {"messages": [{"role": "assistant", "content": "B"}], **row}) == "tool_calls"


def asked(*later: dict, **keys: object) -> dict:
    return {"messages": [{"role": "user", "content": "A"}, *later], **keys}


def calling(*names: str, **keys: object) -> dict:
    calls = [{"id": f"c{place}", "function": {"name": name}} for place, name in enumerate(names)]
    return {"role": "assistant", "tool_calls": calls, **keys}


def result(call_id: str | None = None) -> dict:
    return {"role": "tool", "content": "2", "tool_call_id": call_id}


class TestTheyFitTogether:
    @pytest.mark.parametrize("arguments", ["not JSON", "{'a': 1}", "[1]", "7", "null", [1], 7, True, '"{}"'])
    @pytest.mark.parametrize("shape", ["tool_calls", "function_call", "part", "sharegpt"])
    def test_arguments_that_are_no_object(self, shape, arguments):
        call = {"name": "f", "arguments": arguments}
        if shape == "sharegpt":
            row = {"conversations": [said("human", "A"), said("function_call", json.dumps(call))]}
            assert reason("sharegpt", row) == "bad_arguments"
            return
        held = {
            "tool_calls": {"tool_calls": [call]},
            "function_call": {"function_call": call},
            "part": {"content": [{"type": "tool_call", "value": json.dumps(call)}]},
        }
        assert reason("messages", asked({"role": "assistant", **held[shape]})) == "bad_arguments"

    @pytest.mark.parametrize("key", ["parameters", "args", "input"])
    def test_arguments_under_another_name(self, key):
        row = asked({"role": "assistant", "tool_calls": [{"name": "f", key: {"a": 1}}]})
        assert reason("messages", row) == "bad_arguments"

    @pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]])
    @pytest.mark.parametrize("column", ["tools", "functions"])
    def test_a_tool_that_is_not_declared(self, tools, column):
        assert reason("messages", asked(calling("sub"), **{column: tools})) == "undeclared_tool"
        assert reason("messages", asked(calling("add", "sub"), **{column: tools})) == "undeclared_tool"
        assert to_conversation(MAP_FNS["messages"](asked(calling("add"), **{column: tools}))).tools
        assert to_conversation(MAP_FNS["messages"](asked(calling("sub")))).tools is None

    @pytest.mark.parametrize(
        "later",
        [
            (result(),),
            (CHAT_ANSWER, result()),
            (calling("f"), result("c0"), result("c0")),
            (calling("f"), result("c0"), CHAT_ANSWER, result("c0")),
            (calling("f"), result("c9")),
            (calling("f"), CHAT_ANSWER, {"role": "user", "content": "A"}, CHAT_ANSWER, result()),
        ],
    )
    def test_a_result_that_nobody_called_for(self, later):
        assert reason("messages", asked(*later, CHAT_ANSWER)) == "result_without_call"

    @pytest.mark.parametrize(
        "later",
        [
            (calling("f"), result("c0")),
            (calling("f"), result()),
            (calling("f", "g"), result("c1"), result("c0")),
            (calling("f", "g"), result()),
            (calling("f"), calling("g"), result(), result()),
            ({"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"}, result("x"), result()),
            (calling("f"), result("c0"), calling("f"), result("c0")),
        ],
    )
    def test_results_that_fit(self, later):
        assert to_messages(MAP_FNS["messages"](asked(*later, CHAT_ANSWER)))[-1]["content"] == "B"

    def test_parts_that_are_calls(self):
        parts = [
            {"type": "reasoning", "value": "T"},
            {"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"type": "tool_call", "value": '{"name": "g", "arguments": {}}'},
        ]
        text = (
            '[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}, '
            '{"type": "function", "function": {"name": "g", "arguments": {}}}]'
        )
        answer = {"role": "assistant", "content": "", "weight": 1, "reasoning_content": "T", "tool_calls": text}
        assert to_messages(MAP_FNS["messages"](asked({"role": "assistant", "content": parts})))[1] == answer
        row = {"conversations": [said("human", "A"), said("gpt", parts)]}
        assert to_messages(MAP_FNS["sharegpt"](row))[1] == answer
        twice = asked({"role": "assistant", "content": parts, "tool_calls": [{"name": "f"}]})
        assert reason("messages", twice) == "tool_calls"
        assert reason("openai", asked({"role": "assistant", "content": parts})) == "tool_calls"
        assert reason("wizardlm", row) == "tool_calls"


def test_half_a_character_in_a_call():
    call = {"name": "f", "arguments": {"a": "\ud800"}}
    assert reason("messages", {"messages": [{"role": "assistant", "tool_calls": [call]}]}) == "not_utf8"


@pytest.mark.parametrize("tools", [None, "", " ", "[]", [], {}])
def test_no_tools(tools):
    row = {"messages": [{"role": "assistant", "content": "B"}], "tools": tools}
    assert to_conversation(MAP_FNS["messages"](row)).tools is None


class TestDigest:
    MESSAGES = ({"role": "user", "content": "A", "weight": None}, {"role": "assistant", "content": "B", "weight": 1})

    def digest(self, tools: str | None = None, **keys: object) -> str:
        return content_digest([self.MESSAGES[0], {**self.MESSAGES[1], **keys}], tools).hex()

    def test_rows_without_tools_keep_theirs_of_step_version_1(self):
        plain = "1e7eba4068dc0ef0eb1b93664d112476c24e1f9d0517156a6c8c5a37e0e633dc"
        assert self.digest() == self.digest(weight=0, tool_calls=None, name=None, tool_call_id=None) == plain
        assert self.digest(name="ann") == plain

    def test_calls_and_tools_count(self):
        calls = [self.digest(), self.digest(tool_calls="[1]"), self.digest(tool_calls="[2]"), self.digest("[1]")]
        assert len(set(calls)) == 4


def test_the_store_holds_them(tmp_path):
    plain = {"messages": [{"role": "user", "content": "A"}, CHAT_ANSWER]}
    others = [{"messages": [{"role": "user", "content": f"{n}"}, CHAT_ANSWER]} for n in range(9)]
    lines = [json.dumps(row) for row in (OPENAI, plain, *others)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    fetch_dataset(DatasetConfig(path=str(tmp_path / "rows.jsonl")), tmp_path / "fetched")
    held_out = NormalizeSource(rows=tmp_path / "fetched", name="rows", map_fn="messages")
    normalize_dataset([held_out], NormalizeConfig(), 0.5, 0, tmp_path / "out")
    rows = [row for side in ("train", "heldout") for row in read_shards(tmp_path / "out" / side)]
    with_tools, without, *_ = sorted(rows, key=lambda row: row["row_number"])
    assert list(with_tools) == CONVERSATION_SCHEMA.names
    assert with_tools["messages"][2]["tool_calls"] == STORED
    assert with_tools["messages"][3]["tool_call_id"] == "c1"
    assert json.loads(with_tools["tools"])[0]["function"] == TOOL
    assert without["tools"] is None
    assert without["messages"][1] == {
        "role": "assistant",
        "content": "B",
        "weight": 1,
        "tool_calls": None,
        "name": None,
        "tool_call_id": None,
        "reasoning_content": None,
    }
