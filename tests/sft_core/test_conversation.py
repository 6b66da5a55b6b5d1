"""What a map_fn returns, turned into messages."""

import doctest

import pytest

from sft_core.errors import RowError
from sft_core.normalize import (
    conversation,
    to_messages,
)


class TestConversation:
    def test_turns(self):
        turns = [
            {"system": "S", "input": "A", "output": "B", "output_with_loss": False, "sep": "\n"},
            {"system": "", "input": None, "output": "D", "output_with_loss": True},
        ]
        assert [tuple(message.values()) for message in to_messages({"conversation": turns})] == [
            ("system", "S", None),
            ("user", "A", None),
            ("assistant", "B", 0),
            ("user", "", None),
            ("assistant", "D", 1),
        ]

    def test_messages(self):
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        messages = [{"role": role, "content": role[0]} for role in roles]
        messages[2]["weight"] = 0
        assert [tuple(message.values()) for message in to_messages({"messages": messages})] == [
            ("system", "s", None),
            ("user", "u", None),
            ("assistant", "a", 0),
            ("user", "u", None),
            ("assistant", "a", 1),
        ]

    def test_plain_text_of_xtuner(self):
        turn = {"input": "", "output": "Once", "need_eos_token": False}
        assert to_messages({"conversation": [turn]}) == [{"role": "text", "content": "Once", "weight": 1}]

    @pytest.mark.parametrize(
        ("returned", "reason"),
        [
            (None, "bad_conversation"),
            ({}, "bad_conversation"),
            ({"conversations": []}, "bad_conversation"),
            ({"conversation": {"input": "A"}}, "bad_conversation"),
            ({"conversation": ["A"]}, "bad_conversation"),
            ({"conversation": [{"input": "A"}]}, "bad_conversation"),
            ({"conversation": [{"input": 1, "output": "B"}]}, "bad_conversation"),
            ({"conversation": [{"system": 1, "output": "B"}]}, "bad_conversation"),
            ({"conversation": [{"output": "B", "output_with_loss": "False"}]}, "all_weights_zero"),
            ({"conversation": [{"input": "A", "output": "B", "need_eos_token": False}]}, "bad_conversation"),
            ({"conversation": [{"input": "", "output": " ", "need_eos_token": False}]}, "empty_answer"),
            ({"conversation": []}, "no_turns"),
            ({"conversation": [{"input": "A", "output": " "}]}, "empty_answer"),
            ({"conversation": [{"input": "A", "output": "B", "output_with_loss": False}]}, "all_weights_zero"),
            ({"messages": [{"role": "user", "content": "A"}]}, "no_assistant_turn"),
            ({"messages": [{"role": "tool", "content": "A"}]}, "no_assistant_turn"),
            ({"messages": [{"role": "critic", "content": "A"}]}, "unknown_role"),
            ({"messages": [{"role": ["user"], "content": "A"}]}, "unknown_role"),
            ({"messages": [{"role": "user", "content": "A", "tool_calls": [{"name": "f"}]}]}, "tool_calls"),
            ({"messages": [{"role": "user", "content": "A", "name": 1}]}, "wrong_type"),
            ({"messages": [{"role": "user", "content": "A", "name": "\udcff"}]}, "not_utf8"),
            ({"messages": [{"role": "assistant", "content": ""}]}, "empty_answer"),
            ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "null_value"),
            ({"messages": [{"role": "assistant", "content": "A", "weight": 2}]}, "bad_mark"),
            ({"messages": [{"role": "assistant", "content": "A", "tool_calls": [1]}]}, "tool_calls"),
            ({"messages": []}, "no_turns"),
            ({"text": ""}, "empty_answer"),
            ({"text": None}, "null_value"),
            ({"text": "\udcff"}, "not_utf8"),
        ],
    )
    def test_faults(self, returned, reason):
        with pytest.raises(RowError) as caught:
            to_messages(returned)
        assert caught.value.reason == reason

    def test_doctests(self):
        assert doctest.testmod(conversation).failed == 0
