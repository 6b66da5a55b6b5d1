"""Generated tool calls, in the forms in which templates write them."""

from typing import Any

import pytest

from sft_core.evaluate.calls import CallScore, score_calls

RING = {"type": "function", "function": {"name": "ring", "arguments": {"bell": "Köln", "times": 2}}}
STOP = {"type": "function", "function": {"name": "stop", "arguments": {}}}


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>\n{"name": "ring", "arguments": {"bell": "Köln", "times": 2}}\n</tool_call>',  # Hermes, Qwen
        '[{"name": "ring", "arguments": {"times": 2, "bell": "Köln"}, "id": "abcdefghi"}]',  # Mistral
        '{"name": "ring", "parameters": {"bell": "K\\u00f6ln", "times": 2}}',  # Llama 3.1
        'function<sep>ring\n```json\n{"bell": "Köln", "times": 2}\n```',  # DeepSeek
        'commentary to=functions.ring json<|message|>{"bell": "Köln", "times": 2}',  # gpt-oss
        '{"type": "function", "function": {"name": "ring", "arguments": "{\\"bell\\": \\"Köln\\", \\"times\\": 2}"}}',
        '<think>ring?</think><tool_call>{"name": "ring", "arguments": {"bell": "Köln", "times": 2}}</tool_call>',
        "<function=ring><parameter=bell>Köln</parameter></function>",  # as rendered: no JSON in it
    ],
)
def test_the_same_call_in_any_form(said: str) -> None:
    assert score_calls([RING], said, "<function=ring><parameter=bell>Köln</parameter></function>") == CallScore(1, 1, 1)


@pytest.mark.parametrize(
    ("calls", "said", "expected"),
    [
        ([RING], '{"name": "ring", "arguments": {"bell": "Bonn", "times": 2}}', CallScore(1, 1, 0)),
        ([RING], '{"name": "sing", "arguments": {"bell": "Köln", "times": 2}}', CallScore(0, 1, 0)),
        ([RING], '{"name": "ring", "arguments": "bell Köln"}', CallScore(1, 0, 0)),
        ([RING], '{"name": "ring", "arguments": {"bell": ', CallScore(0, 0, 0)),
        ([RING], "It rang.", CallScore(0, 0, 0)),
        (
            [STOP],
            '<think>{"name": "ring", "arguments": {}}?</think>{"name": "stop", "arguments": {}}',
            CallScore(1, 1, 1),
        ),
        ([RING, STOP], '{"name": "ring", "arguments": {"bell": "Köln", "times": 2}}', CallScore(0.5, 0.5, 0.5)),
        ([STOP], '{"name": "stop", "arguments": {}}\n{"name": "stop", "arguments": {}}', CallScore(0.5, 0.5, 0.5)),
    ],
    ids=[
        "other value",
        "other name",
        "text arguments",
        "cut off",
        "no call",
        "one in the thought",
        "one of two",
        "one too many",
    ],
)
def test_what_is_wrong_counts(calls: list[dict[str, Any]], said: str, expected: CallScore) -> None:
    assert score_calls(calls, said, "as rendered") == expected
