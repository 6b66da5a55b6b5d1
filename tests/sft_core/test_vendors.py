"""Ids of the makers' own packages as oracle: Meta's `llama-models` with Llama 3's tokenizer, Mistral's `mistral-common`
with Nemo's. Both carry the real vocabularies, and encode a prompt message by message, without any chat template."""

from pathlib import Path
from typing import Any

import llama_models.llama3
import mistral_common
import pytest
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral import convert_tekken_tokenizer

from sft_core.pack import IGNORE_INDEX, encode_conversation, load_chat_template

LLAMA = Path(llama_models.llama3.__file__).parent / "tokenizer.model"
NEMO = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße, 你好? 👋🏽"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  two spaces,\n\na gap"},
    {"role": "assistant", "content": "\n\nyes\n"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "no"},
]
NEMO_TEMPLATE = (  # version 3 of Mistral's format, ours
    "{{ bos_token }}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, ChatFormat]:
    """Llama 3's tokenizer as a fast one, and Meta's encoder."""
    vendor = Tokenizer(LLAMA)
    special = [token for token, _ in sorted(vendor.special_tokens.items(), key=lambda entry: entry[1])]
    converter = TikTokenConverter(str(LLAMA), pattern=vendor.pat_str, extra_special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    return fast, ChatFormat(vendor)


@pytest.fixture(scope="module")
def nemo() -> tuple[Any, MistralTokenizer]:
    """Nemo's tokenizer as a fast one, and Mistral's encoder."""
    fast = convert_tekken_tokenizer(str(NEMO))
    fast.bos_token, fast.eos_token = "<s>", "</s>"
    return fast, MistralTokenizer.from_file(str(NEMO))


def turns(
    talk: list[dict[str, Any]], tokenizer: Any, template: str, tools: Any = None
) -> list[tuple[list[int], list[int]]]:
    """Of every trained turn, in order: the ids before it, and its own."""
    found = []
    for sequence in encode_conversation(talk, tokenizer, template, tools):
        labels, at = sequence.labels, 0
        while at < len(labels):
            if labels[at] == IGNORE_INDEX:
                at += 1
                continue
            end = next((i for i in range(at, len(labels)) if labels[i] == IGNORE_INDEX), len(labels))
            found.append((sequence.input_ids[:at], labels[at:end]))
            at = end
    return found


def test_llama_3_by_metas_own_encoder(llama: tuple[Any, ChatFormat]) -> None:
    tokenizer, vendor = llama
    made = turns(TALK, tokenizer, load_chat_template("llama3_chat"))
    asked = [place for place, message in enumerate(TALK) if message["role"] == "assistant"]
    assert len(made) == len(asked) == 3
    for (before, own), place in zip(sorted(made, key=lambda turn: len(turn[0])), asked, strict=True):
        messages = [RawMessage(role=m["role"], content=m["content"]) for m in TALK[: place + 1]]
        if place < 6:  # behind the answer that begins with line breaks, Meta goes on with other ids than a template
            assert before == vendor.encode_dialog_prompt(messages[:-1]).tokens
        assert own == vendor.tokenizer.encode(TALK[place]["content"], bos=False, eos=False) + [
            vendor.tokenizer.special_tokens["<|eot_id|>"]
        ]


def test_nemo_by_mistrals_own_encoder(nemo: tuple[Any, MistralTokenizer]) -> None:
    tokenizer, vendor = nemo
    talk = [{**message, "content": message["content"].strip()} for message in TALK[1:]]
    made = turns(talk, tokenizer, NEMO_TEMPLATE)
    kinds = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    for (before, own), place in zip(made, (1, 3, 5), strict=True):
        messages = [kinds[m["role"]](content=m["content"]) for m in talk[:place]]
        assert before == vendor.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert own == vendor.instruct_tokenizer.tokenizer.encode(talk[place]["content"], bos=False, eos=True)


def test_nemos_tool_calls_by_mistrals_own_encoder(nemo: tuple[Any, MistralTokenizer]) -> None:
    tokenizer, vendor = nemo
    schema = {"type": "object", "properties": {"bell": {"type": "string", "description": "Which one, ü."}}}
    function = {"name": "ring", "description": "Ring a bell.", "parameters": schema}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "ring", "arguments": {"bell": "Köln"}}}
    talk = [
        {"role": "user", "content": "Ring."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rang", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It rang."},
    ]
    called = ToolCall(id="abcdefghi", function=FunctionCall(name="ring", arguments='{"bell": "Köln"}'))
    messages = [
        UserMessage(content="Ring."),
        AssistantMessage(content=None, tool_calls=[called]),
        ToolMessage(content="rang", tool_call_id="abcdefghi"),
        AssistantMessage(content="It rang."),
    ]
    served = [
        vendor.encode_chat_completion(
            ChatCompletionRequest(messages=messages[:place], tools=[Tool(function=Function(**function))])
        )
        for place in (1, 3)
    ]
    made = turns(talk, tokenizer, NEMO_TEMPLATE, [{"type": "function", "function": function}])
    assert [before for before, _ in made] == [prompt.tokens for prompt in served]
    assert [tokenizer.decode(own) for _, own in made] == [
        '[TOOL_CALLS][{"name": "ring", "arguments": {"bell": "Köln"}, "id": "abcdefghi"}]</s>',
        "It rang.</s>",
    ]
