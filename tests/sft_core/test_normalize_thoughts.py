"""Thoughts of assistant messages: under every name, in every shape, through every map_fn that passes messages on."""

import doctest
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sft_core.errors import RowError
from sft_core.fetch import fetch_dataset
from sft_core.normalize import (
    MAP_FNS,
    NormalizeSource,
    content_digest,
    normalize_dataset,
    thoughts,
    to_conversation,
)
from sft_core.recipe import DatasetConfig, NormalizeConfig

NAMES = ("reasoning_content", "reasoning", "thinking")
CALL = {"function": {"name": "f", "arguments": "{}"}}
CALLS = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chat(answer: dict, ask: object = "A", **keys: object) -> dict:
    return {"messages": [{"role": "user", "content": ask, **keys}, {"role": "assistant", **answer}]}


def shared(answer: dict, **keys: object) -> dict:
    return {"conversations": [{"from": "human", "value": "A", **keys}, {"from": "gpt", **answer}]}


def stored(name: str, row: dict) -> list[dict]:
    return [dict(message) for message in to_conversation(MAP_FNS[name](row)).messages]


def refusal(name: str, row: dict) -> RowError:
    with pytest.raises(RowError) as caught:
        to_conversation(MAP_FNS[name](row))
    return caught.value


ANSWERED = [
    {"role": "user", "content": "A", "weight": None},
    {"role": "assistant", "content": "B", "weight": 1, "reasoning_content": " T\n"},
]


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        ("map_fn", "row"),
        [
            ("messages", lambda keys: chat({"content": "B", **keys})),
            ("openai", lambda keys: chat({"content": "B", **keys})),
            ("sharegpt", lambda keys: shared({"value": "B", **keys})),
            ("sharegpt", lambda keys: {"conversations": chat({"content": "B", **keys})["messages"]}),
            ("wizardlm", lambda keys: shared({"value": "B", **keys})),
            ("default", lambda keys: {"conversation": [{"input": "A", "output": "B", **keys}]}),
        ],
    )
    def test_every_map_fn_lets_them_through(self, map_fn, row, name):
        assert stored(map_fn, row({name: " T\n"})) == ANSWERED

    @pytest.mark.parametrize("name", NAMES)
    def test_msagent_react(self, name):
        said = {"from": "assistant", "value": "B", name: "T"}
        row = {"conversations": repr([{"from": "user", "value": "A"}, said])}
        assert stored("msagent_react", row)[1] == {
            "role": "assistant",
            "content": "Final Answer:B\n",
            "weight": 1,
            "reasoning_content": "T",
        }

    def test_xtuners_turns_and_messages_of_a_map_fn_of_ones_own(self):
        turn = {"system": "S", "input": "A", "output": "B", "reasoning_content": "T"}
        messages = [message | {"reasoning_content": message.get("reasoning_content")} for message in ANSWERED]
        assert to_conversation({"conversation": [turn]}).messages[2]["reasoning_content"] == "T"
        assert to_conversation({"messages": messages}).messages == ANSWERED

    @pytest.mark.parametrize("thought", ["T", " T\n", "<think>T</think>", "你好\n\nT"])
    def test_a_thought_stays_as_it_is(self, thought):
        assert stored("messages", chat({"content": "B", "thinking": thought}))[1]["reasoning_content"] == thought

    @pytest.mark.parametrize("empty", [None, "", " \n", [], {}, False])
    @pytest.mark.parametrize("name", [*NAMES, "reasoning_details", "thinking_blocks", "thought", "refusal", "images"])
    def test_nothing_is_none(self, name, empty):
        row = chat({"content": "B", name: empty}, **{name: empty})
        assert stored("messages", row) == [ANSWERED[0], {"role": "assistant", "content": "B", "weight": 1}]

    def test_one_text_under_two_names(self):
        answer = {"content": [{"type": "thinking", "thinking": "T"}, text("B")], "reasoning": "T", "thinking": "T"}
        details = {"reasoning_details": [{"type": "reasoning.text", "text": "T"}], "thought": "T"}
        assert stored("messages", chat(answer | details))[1] == {
            "role": "assistant",
            "content": "B",
            "weight": 1,
            "reasoning_content": "T",
        }

    def test_think_inside_a_content_stays_there(self):
        (_, answer) = stored("messages", chat({"content": "<think>T</think>B"}))
        assert answer == {"role": "assistant", "content": "<think>T</think>B", "weight": 1}


class TestParts:
    @pytest.mark.parametrize("key", ["thinking", "reasoning", "text", "content", "value"])
    @pytest.mark.parametrize("kind", ["thinking", "reasoning"])
    @pytest.mark.parametrize("map_fn", ["messages", "openai", "sharegpt"])
    def test_every_type_and_key(self, map_fn, kind, key):
        parts = [{"type": kind, key: "T"}, text("B"), {"type": kind, key: "U"}, text("C")]
        row = shared({"value": parts}) if map_fn == "sharegpt" else chat({"content": parts})
        answer = {"role": "assistant", "content": "BC", "weight": 1, "reasoning_content": "T\nU"}
        assert stored(map_fn, row) == [ANSWERED[0], answer]

    @pytest.mark.parametrize(
        ("part", "thought"),
        [
            ({"type": "thinking", "thinking": [text("T"), text("U")], "closed": True}, "TU"),  # Mistral
            ({"type": "reasoning", "id": "r", "content": [{"type": "reasoning_text", "text": "T"}]}, "T"),  # OpenAI
            ({"type": "reasoning", "text": "T", "summary": [{"type": "summary_text", "text": "S"}]}, "T"),
            ({"type": "thinking", "thinking": "T", "signature": "s"}, "T"),  # Anthropic
            ({"type": "thinking", "thinking": "T", "text": None, "reasoning": "", "value": "T"}, "T"),
            ({"type": "thinking", "thinking": "", "signature": None}, None),
            ({"type": "reasoning"}, None),
        ],
    )
    def test_shapes(self, part, thought):
        (_, answer) = stored("messages", chat({"content": [part, text("B")]}))
        assert (answer["content"], answer.get("reasoning_content")) == ("B", thought)

    def test_text_that_is_null_in_a_struct_of_parquet(self):
        parts = [{"type": "thinking", "thinking": "T", "text": None}, {"type": "text", "thinking": None, "text": "B"}]
        assert stored("messages", chat({"content": parts}))[1]["reasoning_content"] == "T"


class TestAnswers:
    @pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
    def test_a_call_needs_no_content(self, content):
        (_, answer) = stored("messages", chat({"reasoning_content": "T", "tool_calls": [CALL], **content}))
        assert answer == {
            "role": "assistant",
            "content": "",
            "weight": 1,
            "reasoning_content": "T",
            "tool_calls": CALLS,
        }

    def test_a_call_beside_a_part(self):
        row = chat({"content": [{"type": "thinking", "thinking": "T"}], "tool_calls": [CALL]})
        assert stored("messages", row)[1]["reasoning_content"] == "T"

    def test_sharegpts_calls(self):
        call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "thinking": "T"}
        row = {"conversations": [{"from": "human", "value": "A"}, call]}
        answer = {"role": "assistant", "content": "", "weight": 1, "reasoning_content": "T", "tool_calls": CALLS}
        assert stored("sharegpt", row) == [ANSWERED[0], answer]
        assert stored("sharegpt", shared({"value": None, "tool_calls": [CALL], "thinking": "T"}))[1] == answer

    @pytest.mark.parametrize(
        ("content", "reason"), [({"content": ""}, "empty_answer"), ({"content": None}, "null_value")]
    )
    def test_a_thought_is_no_answer(self, content, reason):
        assert refusal("messages", chat({"thinking": "T", **content})).reason == reason
        assert refusal("messages", chat({"content": [{"type": "thinking", "thinking": "T"}]})).reason == "empty_answer"

    def test_an_untrained_answer_keeps_its_thought(self):
        row = chat({"content": "B", "thinking": "T", "weight": 0})
        row["messages"] += chat({"content": "C"})["messages"]
        assert [message.get("reasoning_content") for message in stored("messages", row)] == [None, "T", None, None]


PART = {"type": "thinking", "thinking": "T"}
DETAILS = [{"type": "reasoning.encrypted", "data": "x"}]


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        ({"reasoning_content": "T", "thinking": "U"}, "two_thoughts", "reasoning_content 'T' and thinking 'U'"),
        (
            {"content": [PART, text("B")], "reasoning": "U"},
            "two_thoughts",
            "reasoning 'U' and the parts of content 'T'",
        ),
        ({"content": [{**PART, "text": "U"}]}, "two_thoughts", "messages[1].content[0] has two thoughts"),
        ({"reasoning": [{"text": "T"}]}, "bad_thought", "messages[1].reasoning is a list, not a text"),
        ({"thinking": {"text": "T"}}, "bad_thought", "messages[1].thinking is a dict, not a text"),
        ({"thinking": True}, "bad_thought", "messages[1].thinking is a bool, not a text"),
        ({"reasoning_details": DETAILS}, "bad_thought", "messages[1].reasoning_details is not read, and no plain text"),
        ({"thinking_blocks": DETAILS, "thinking": " "}, "bad_thought", "under reasoning_content"),
        ({"thought": "T"}, "bad_thought", "messages[1].thought is a thought under a name that is not read"),
        ({"cot": "T", "thinking": "U"}, "bad_thought", "messages[1].cot"),
        ({"channel": "analysis"}, "bad_thought", "the channel analysis"),
        ({"content": [{"type": "thinking", "thinking": [{"x": 1}]}]}, "bad_thought", "thinking is a list, not a text"),
        ({"content": [{"type": "thinking", "thinking": [PART]}]}, "bad_thought", "thinking is a list, not a text"),
        ({"content": [{"type": "reasoning", "summary": [text("S")]}]}, "bad_thought", "has no text, but summary"),
        ({"content": [{"type": "thinking", "thinking": "", "signature": "s"}]}, "bad_thought", "but signature"),
        ({"content": [text("B") | {"thinking": "T"}]}, "bad_thought", "has a thought, and the type 'text'"),
        ({"content": [{"type": "redacted_thinking", "data": "x"}]}, "content_part", "redacted_thinking"),
        ({"reasoning_content": "\ud800"}, "not_utf8", "U+D800"),
        ({"refusal": "No."}, "content_part", "messages[1] holds refusal, which is not read: 'No.'"),
        ({"images": ["a.png"]}, "content_part", "messages[1] holds images"),
    ],
)
def test_what_would_be_lost_is_refused(answer, reason, words):
    row = chat({"content": "B", **answer})
    for name in ("messages", "openai"):
        error = refusal(name, row)
        assert error.reason == reason
        assert words in error.detail or reason == "not_utf8"


@pytest.mark.parametrize("keys", [*({name: "T"} for name in NAMES), {"content": [PART]}])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_thought_on_anothers_message(role, keys):
    before = {"role": role, "content": "A", **keys}
    error = refusal("messages", {"messages": [before, {"role": "assistant", "content": "B"}]})
    assert (error.reason, "not the assistant's" in error.detail) == ("bad_thought", True)
    if role != "tool":
        assert refusal("openai", {"messages": [before, *chat({"content": "B"})["messages"]]}).reason == "bad_thought"
    before = {"from": {"user": "human"}.get(role, role), "value": "A", **keys}
    before["value"] = before.pop("content", "A")
    for name in ("sharegpt", "wizardlm", "msagent_react"):
        if isinstance(before["value"], str) and (role == "user" or name == "sharegpt"):
            said = {"conversations": [before | {"from": "user"}, {"from": "assistant", "value": "B"}]}
            row = said if name == "msagent_react" else {"conversations": [before, {"from": "gpt", "value": "B"}]}
            assert refusal(name, row).reason == "bad_thought"


def test_a_thought_on_plain_text_and_on_turns():
    turn = {"input": "", "output": "Once", "need_eos_token": False, "thinking": "T"}
    assert refusal("default", {"conversation": [turn]}).reason == "bad_thought"
    turn = {"input": "A", "output": "B", "thinking": "T", "reasoning": "U"}
    assert refusal("default", {"conversation": [turn]}).reason == "two_thoughts"
    assert "conversation[0].thinking is a list" in str(
        refusal("default", {"conversation": [{**turn, "reasoning": None, "thinking": ["T"]}]})
    )


TEXTS = """role content from value name tool_call_id tool_calls function_call reasoning_content reasoning thinking
refusal audio image images video videos channel thought thoughts think thinking_content reasoning_text cot
chain_of_thought reasoning_details thinking_blocks id timestamp created_at model source language lang hashed_ip state
header""".split()
IGNORED = {"id", "timestamp", "created_at", "model", "source", "language", "lang", "hashed_ip", "state", "header"}
"""Keys of WildChat's, LMSYS's and others' messages that say nothing of what was said."""
NO_PLACE = {
    "openai": {"name", "tool_call_id", "value", "from"},  # XTuner's turns have no speakers' names
    "wizardlm": {"name", "tool_call_id", "content", "role"},
    "msagent_react": {"name", "tool_call_id", "content", "role"},
    "sharegpt": {"content", "role"},  # stand for `value` and `from` where these are missing
    "messages": {"value", "from"},
}


@pytest.mark.parametrize("map_fn", NO_PLACE)
@pytest.mark.parametrize("at", [0, 1])
def test_no_text_of_a_message_is_ignored_but_under_known_keys(map_fn, at):
    ignored = set()
    for key in TEXTS:
        mark = "analysis" if key == "channel" else "MARK"
        answer = {"content": "B"} if map_fn in ("messages", "openai") else {"value": "B"}
        row = chat(answer) if "content" in answer else shared(answer)
        (messages,) = row.values()
        if map_fn == "msagent_react":
            for message, who in zip(messages, ("user", "assistant"), strict=True):
                message["from"] = who
        messages[at][key] = mark
        try:
            kept = json.dumps(stored(map_fn, row))
        except RowError:
            continue
        if mark not in kept:
            ignored.add(key)
    assert ignored == IGNORED | NO_PLACE[map_fn]


class TestDigest:
    MESSAGES = ({"role": "user", "content": "A", "weight": None}, {"role": "assistant", "content": "B", "weight": 1})

    def digest(self, **keys: object) -> str:
        return content_digest([self.MESSAGES[0], {**self.MESSAGES[1], **keys}]).hex()

    def test_rows_without_thoughts_keep_theirs_of_step_version_3(self):
        plain = "1e7eba4068dc0ef0eb1b93664d112476c24e1f9d0517156a6c8c5a37e0e633dc"
        assert self.digest() == self.digest(reasoning_content=None) == self.digest(reasoning_content="") == plain
        called = [
            self.MESSAGES[0],
            {"role": "assistant", "content": "", "weight": 1, "tool_calls": CALLS, "reasoning_content": None},
            {"role": "tool", "content": "2", "weight": None, "name": "f", "tool_call_id": "c1"},
            {**self.MESSAGES[1], "weight": 0},
        ]
        tools = '[{"type": "function", "function": {"name": "f"}}]'
        with_calls = "a666ef644fc33e3eaafef47dbd105dc94eac5d61dedd72541c6f23e0caa457b6"
        assert content_digest(called, tools).hex() == with_calls

    def test_thoughts_count(self):
        digests = {self.digest(), self.digest(reasoning_content="T"), self.digest(reasoning_content="U")}
        assert len(digests | {self.digest(tool_calls="T")}) == 4
        first = "31ae01f2719459a8016129dac958b2ffc143ed0be4a9245620806680306fd3f9"
        assert self.digest(reasoning_content="T") == first  # [["user","A"],["assistant","B",{"reasoning_content":"T"}]]


def normalized(tmp_path: Path, rows: dict[str, list], fraction: float = 0.3, near: float | None = None) -> list[dict]:
    """Rows of both sides as Parquet has them, and of the quarantine, of the real step; rows by map_fn."""
    sources = []
    for map_fn, entries in rows.items():
        (tmp_path / f"{map_fn}.jsonl").write_text("\n".join(map(json.dumps, entries)), "utf-8")
        fetch_dataset(DatasetConfig(path=str(tmp_path / f"{map_fn}.jsonl")), tmp_path / map_fn)
        sources.append(NormalizeSource(rows=tmp_path / map_fn, name=map_fn, map_fn=map_fn))
    config = NormalizeConfig(near_duplicates=near)
    outcome = normalize_dataset(sources, config, fraction, 0, tmp_path / "out")
    files = [*(tmp_path / "out" / "train").glob("*.parquet"), *(tmp_path / "out" / "heldout").glob("*.parquet")]
    assert len(files) > 1
    found = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    lengths = [len(m["content"]) + len(m["reasoning_content"] or "") for row in found for m in row["messages"]]
    assert outcome.ledger["characters"]["out"] == sum(lengths)
    amounts = outcome.ledger["characters"]
    assert amounts["in"] == amounts["out"] + sum(amounts["set_aside"].values())
    lines = (tmp_path / "out" / "quarantine" / "part-00000.jsonl").read_text("utf-8").splitlines()
    return found + [json.loads(line) for line in lines]


class TestStore:
    @pytest.mark.parametrize("seed", range(3))
    def test_every_thought_that_goes_in_comes_out(self, tmp_path, seed):
        draw, put = random.Random(seed), Counter()

        def think(key: str | None) -> dict:
            """Keys of an answer, with one thought or none, put in one of all ways; `key` holds the answer."""
            pieces = [draw.choice("你é<& ") + str(draw.random()) for _ in range(draw.randint(0, 3))]
            thought, answer = "\n".join(pieces), f"B{draw.random()}"
            put.update([thought] if pieces else [])
            kinds = [{"type": draw.choice(["thinking", "reasoning"]), draw.choice(NAMES[1:]): p} for p in pieces]
            names = {name: thought or draw.choice([None, ""]) for name in draw.sample(NAMES, draw.randint(1, 3))}
            if key is None:
                return {"output": answer, **names}
            in_parts = {key: [*kinds, text(answer)], **(names if draw.random() < 0.3 else {})}
            return draw.choice([in_parts, {key: answer, **names}]) if key == "content" else {key: answer, **names}

        def talk(role: str, roles: tuple[str, str], key: str, way: str | None = None) -> list[dict]:
            ask = [{role: roles[0], key: f"A{draw.random()}"} for _ in range(2)]
            return [m for a in ask for m in (a, {role: roles[1], **think(way or key)})]

        people = {"wizardlm": ("human", "gpt"), "sharegpt": ("human", "gpt"), "msagent_react": ("user", "assistant")}
        rows = {
            name: [{"messages": talk("role", ("user", "assistant"), "content")} for _ in range(40)]
            for name in ("messages", "openai")
        }
        rows |= {
            name: [{"conversations": talk("from", who, "value")} for _ in range(40)] for name, who in people.items()
        }
        rows["default"] = [{"conversation": [{"input": f"A{draw.random()}", **think(None)}]} for _ in range(40)]
        found = normalized(tmp_path, rows)
        assert len(found) == 240
        assert Counter(m["reasoning_content"] for r in found for m in r["messages"] if m["reasoning_content"]) == put
        assert sum(put.values()) > 100

    def test_a_row_that_leaves_the_held_out_side_takes_its_thought_along(self, tmp_path):
        """One question and answer, thought about in many ways, is in training: what is held out of it is no test."""
        words = " ".join(map(str, range(40)))
        powers = [" ".join(str((n + 2) ** power) for power in range(40)) for n in range(20)]
        rows = [chat({"content": f"B {words}", "reasoning_content": thought}) for thought in powers]
        rows += [chat({"content": f"C{n}"}) for n in range(20)]
        aside = [row for row in normalized(tmp_path, {"messages": rows}, near=0.8) if "reason" in row]
        assert 0 < len(aside) < 20
        assert {row["reason"] for row in aside} == {"near_duplicate"}
        for row in aside:
            asked, answer = rows[row["row_number"] - 1]["messages"]
            assert json.loads(row["row"])["messages"] == [asked, answer | {"weight": 1}]


def test_doctests():
    assert doctest.testmod(thoughts).failed == 0
