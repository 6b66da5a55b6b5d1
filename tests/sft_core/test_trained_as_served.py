"""What is trained is what the row says and what a server feeds: each way in which templates fail that, in a small one.

Templates here are our own; each shows one habit of real ones. The oracle is `apply_chat_template` of transformers.
"""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_core.errors import DataError, RecipeError, RowError
from sft_core.pack import IGNORE_INDEX, encode_conversation, load_chat_template, stop_token_ids, template_of
from sft_core.pack.proof import prove_rows
from sft_core.pack.rendering import render_conversation
from sft_core.pack.template import bind_template
from sft_core.recipe import PackConfig

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|call|>"]
ADDED = ["<think>", "</think>", "<call>", "</call>"]
BODY = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKS = (  # renders the field, of answers behind the last question; what has no thought gets an empty one
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLS = (  # tools in front; calls beside no content only, ended by a token of their own
    "{% if tools %}<|system|>\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}<|call|>{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
THOUGHT = {**ANSWER, "reasoning_content": "t"}
TOOL = {"type": "function", "function": {"name": "ring", "description": "Ring it.", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "ring", "arguments": {"bell": "Köln"}}}],
}
RESULT = {"role": "tool", "content": "rang"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a token for two line breaks, as Qwen's has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")]))
    lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\S+|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def trained(tokenizer: Any, messages: list[dict[str, Any]], template: str, **options: Any) -> list[tuple[str, str]]:
    """Of every sequence: the text before its first trained token, and what is trained."""
    return [
        (
            tokenizer.decode(sequence.input_ids[: next(i for i, n in enumerate(sequence.labels) if n != IGNORE_INDEX)]),
            tokenizer.decode([label for label in sequence.labels if label != IGNORE_INDEX]),
        )
        for sequence in encode_conversation(messages, tokenizer, template, **options)
    ]


def refused(tokenizer: Any, messages: list[dict[str, Any]], template: str, **options: Any) -> str:
    with pytest.raises(RowError) as caught:
        encode_conversation(messages, tokenizer, template, **options)
    return caught.value.reason


def test_thoughts_are_trained_and_earlier_ones_left_out_as_at_the_server(tokenizer: Any) -> None:
    assert trained(tokenizer, [ASK, THOUGHT, ASK, THOUGHT], THINKS) == [
        ("<|user|>\nq<|end|>\n<|assistant|>\n", "<think>\nt\n</think>\n\na<|end|>"),
        (
            "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n",
            "<think>\nt\n</think>\n\na<|end|>",
        ),
    ]


def test_inline_thoughts_go_to_the_field_where_only_that_is_rendered(tokenizer: Any) -> None:
    inline = {**ANSWER, "content": "<think>t</think>\n\na"}
    assert trained(tokenizer, [ASK, inline], THINKS) == trained(tokenizer, [ASK, THOUGHT], THINKS)
    assert trained(tokenizer, [ASK, inline], BODY) == [
        ("<|user|>\nq<|end|>\n<|assistant|>\n", "<think>t</think>\n\na<|end|>")
    ]


@pytest.mark.parametrize("answer", [THOUGHT, {**ANSWER, "content": "<think>t</think>a"}])
def test_a_template_that_cuts_thoughts_out_is_refused(tokenizer: Any, answer: dict[str, Any]) -> None:
    cuts = BODY.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert refused(tokenizer, [ASK, answer], cuts) == "lost_thought"


def test_reasoning_drop_leaves_thoughts_out(tokenizer: Any) -> None:
    dropped = bind_template(THINKS, {"drop_reasoning": True})
    for answer in (THOUGHT, {**ANSWER, "content": "<think>t</think>\n\na"}):
        assert trained(tokenizer, [ASK, answer], dropped)[0][1] == "<think>\n\n</think>\n\na<|end|>"


def test_a_variable_moves_the_empty_thought_into_the_prompt(tokenizer: Any) -> None:
    assert trained(tokenizer, [ASK, ANSWER], THINKS)[0][1] == "<think>\n\n</think>\n\na<|end|>"
    assert trained(tokenizer, [ASK, ANSWER], THINKS, template_kwargs={"enable_thinking": False}) == [
        ("<|user|>\nq<|end|>\n<|assistant|>\n<think>\n\n</think>\n\n", "a<|end|>")
    ]
    assert refused(tokenizer, [ASK, THOUGHT], THINKS, template_kwargs={"enable_thinking": False}) == "served_prompt"


def test_bound_variables_hold_for_a_server_that_is_not_told(tokenizer: Any) -> None:
    bound = bind_template(THINKS, {"enable_thinking": False, "unused": {"a": [1, None, "%}\n\"'"]}})
    told = tokenizer.apply_chat_template(
        [ASK], chat_template=THINKS, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    render = {"chat_template": bound, "add_generation_prompt": True, "tokenize": False}
    assert tokenizer.apply_chat_template([ASK], **render) == told
    overruled = tokenizer.apply_chat_template([ASK], **render, enable_thinking=True)
    assert overruled == "<|user|>\nq<|end|>\n<|assistant|>\n"
    assert bind_template("\n x", {"a": 1}).endswith("\n x")
    assert tokenizer.apply_chat_template([ASK], chat_template=bind_template("\n x", {"a": 1}), tokenize=False) == "\n x"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "eos_token", "a b", "strftime_date"])
def test_what_is_no_variable_of_a_recipe_is_an_error(name: str) -> None:
    with pytest.raises(RecipeError, match=f"pack.template_kwargs.*{name}"):
        bind_template(BODY, {name: "x"})


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("<|assistant|>\n<think>\n", "served_prompt"),  # R1: only the server writes it
        ("<|assistant|>", None),
        ("", None),  # then the model writes the header
        ("<|assistant|>\n\n", "served_prompt"),
    ],
)
def test_what_the_server_writes_before_an_answer_is_what_training_has(
    tokenizer: Any, prompt: str, reason: str | None
) -> None:
    template = BODY.replace("<|assistant|>\n{% endif %}", prompt + "{% endif %}")
    if reason:
        assert refused(tokenizer, [ASK, ANSWER], template) == reason
        return
    served = tokenizer.apply_chat_template([ASK], chat_template=template, add_generation_prompt=True, tokenize=False)
    assert trained(tokenizer, [ASK, ANSWER], template)[0][0] == served


def test_the_token_that_begins_an_answer_is_trained(tokenizer: Any) -> None:
    """Though it begins with the same characters as the token that a server's prompt goes on with."""
    template = BODY.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<|call|>{% endif %}{{ m.content }}")
    assert trained(tokenizer, [ASK, ANSWER], template)[0][1] == "<|call|>a<|end|>"
    other = template.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<|tool|>{% endif %}")
    assert refused(tokenizer, [ASK, ANSWER], other) == "served_prompt"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}<|system|>\nbe<|end|>\n{% endif %}" + BODY,  # a default system prompt
        BODY.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt and messages %}"),
        "{{ messages[0].content.strip()[:0] }}" + BODY,
    ],
)
def test_a_talk_that_begins_with_the_assistant_is_refused_in_plain_words(tokenizer: Any, template: str) -> None:
    with pytest.raises(RowError, match="assistant_first: the first message is an answer"):
        encode_conversation([ANSWER, ASK, ANSWER], tokenizer, template)
    ((before, _),) = trained(tokenizer, [{**ANSWER, "weight": 0}, ASK, ANSWER], template)
    assert before.endswith("<|assistant|>\na<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize(
    ("habit", "messages", "reason"),
    [
        ("{% if loop.first or m.role != 'system' %}", [{"role": "system", "content": "A"}, ASK, ANSWER], None),
        (
            "{% if loop.first or m.role != 'system' %}",
            [{"role": "system", "content": "A"}, ASK, ANSWER, {"role": "system", "content": "A"}, ASK, ANSWER],
            "lost_text",  # XTuner's per-turn system: the same words stand in front
        ),
        ("{% if m.role != 'tool' %}", [ASK, ANSWER, RESULT, ANSWER], "lost_text"),
        ("{% if m.role != 'user' or loop.first %}", [ASK, ANSWER, ASK, ANSWER], "lost_text"),
    ],
)
def test_what_a_template_leaves_out_of_the_context_is_not_lost_in_silence(
    tokenizer: Any, habit: str, messages: list[dict[str, Any]], reason: str | None
) -> None:
    template = BODY.replace("%}<|{{", f"%}}{habit}<|{{{{").replace("\n{% endfor", "\n{% endif %}{% endfor")
    if reason is None:
        assert len(trained(tokenizer, messages, template)) == 1
    else:
        assert refused(tokenizer, messages, template) == reason


def test_calls_and_their_results(tokenizer: Any) -> None:
    assert trained(tokenizer, [ASK, CALL, RESULT, ANSWER], CALLS, tools=[TOOL]) == [
        (
            f"<|system|>\n{json.dumps([TOOL])}<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n",
            '<call>ring {"bell": "Köln"}</call><|call|>a<|end|>',
        )
    ]
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, CALLS)) == ["<|end|>", "<|call|>", "</s>"]
    assert refused(tokenizer, [ASK, {**CALL, "content": "so"}, RESULT, ANSWER], CALLS) == "lost_text"
    assert refused(tokenizer, [ASK, CALL, RESULT, ANSWER], BODY) == "tool_calls"
    assert refused(tokenizer, [ASK, ANSWER], BODY + "{# mentions tools and tool_calls #}", tools=[TOOL]) == "tools"
    first_only = CALLS.replace("in m.tool_calls", "in m.tool_calls[:1]")
    second = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    both = {**CALL, "tool_calls": [*CALL["tool_calls"], second]}
    assert refused(tokenizer, [ASK, both, RESULT, ANSWER], first_only) == "tool_calls"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{% if m.tool_calls %}", "{% if m.content is none %}"),  # Mistral's: none beside a call
        ("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"),  # DeepSeek's: JSON text
        ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"),  # would print as Python does
    ],
)
def test_calls_are_given_in_the_form_that_a_template_renders(tokenizer: Any, old: str, new: str) -> None:
    assert CALLS.count(old) == 1
    made = trained(tokenizer, [ASK, CALL, RESULT, ANSWER], CALLS.replace(old, new))
    assert made == trained(tokenizer, [ASK, CALL, RESULT, ANSWER], CALLS)


def test_contents_are_given_as_parts_where_a_template_reads_only_these(tokenizer: Any) -> None:
    parts = BODY.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert trained(tokenizer, [ASK, ANSWER], parts) == trained(tokenizer, [ASK, ANSWER], BODY)


@pytest.mark.parametrize("template", [THINKS, BODY], ids=["behind a line break", "behind two"])
def test_an_answer_that_merges_with_its_prompt_is_trained_behind_the_prompts_own_tokens(
    tokenizer: Any, template: str
) -> None:
    template = template.replace("<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n", "")
    answer = {**ANSWER, "content": "\na"}
    prompt = tokenizer.apply_chat_template([ASK], chat_template=template, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    (sequence,) = encode_conversation([ASK, answer], tokenizer, template)
    assert sequence.input_ids[: len(prompt)] == prompt
    assert sequence.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert tokenizer.decode([label for label in sequence.labels if label != IGNORE_INDEX]) == "\na<|end|>"
    first, second = encode_conversation([ASK, answer, ASK, ANSWER], tokenizer, template)
    assert first == sequence
    assert tokenizer.decode([label for label in second.labels if label != IGNORE_INDEX]) == "a<|end|>"
    whole = tokenizer.apply_chat_template(
        [ASK, answer, ASK], chat_template=template, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert second.input_ids[: len(whole)] == whole  # here the server's own tokens are the merged ones


def test_what_stands_behind_the_last_turn_only_is_not_trained(tokenizer: Any) -> None:
    """Phi-3's eos; and one sequence for all turns."""
    talk = [ASK, ANSWER] * 3
    for behind in (
        "{% if not add_generation_prompt %}</s>{% endif %}",
        "{{ '' if add_generation_prompt else '<|user|>' }}",
    ):
        assert [text for _, text in trained(tokenizer, talk, BODY + behind)] == ["a<|end|>" * 3]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (BODY.replace("<|end|>", ""), "no_stop"),
        (BODY.replace("<|end|>", "</call>"), None),  # an added token, where there is no special one: it stops
        (CALLS.replace("<|call|>", ""), "no_stop"),  # GLM's: </call> ends a call, and nothing stops at it
        (THINKS.replace("</think>\n\n{% endif %}", "</think><|end|>\n{% endif %}"), "stops_early"),
    ],
)
def test_every_trained_turn_ends_with_a_token_that_stops_generation(
    tokenizer: Any, template: str, reason: str | None
) -> None:
    talk = [ASK, CALL, RESULT, ANSWER] if "tool_calls" in template else [ASK, {**ANSWER, "content": "ab"}]
    talk = [ASK, THOUGHT] if reason == "stops_early" else talk
    if reason is None:
        assert trained(tokenizer, talk, template)[0][1] == "ab</call>"
        assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, template)) == ["</call>", "</s>"]
    else:
        assert refused(tokenizer, talk, template) == reason


def test_marks_must_cover_what_the_model_writes(tokenizer: Any) -> None:
    marked = BODY.replace(
        "{{ m.content }}<|end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{{ '' }}",
    )
    assert trained(tokenizer, [ASK, ANSWER, ASK, ANSWER], marked) == trained(
        tokenizer, [ASK, ANSWER, ASK, ANSWER], BODY
    )
    assert (
        refused(
            tokenizer,
            [ASK, ANSWER],
            marked.replace("<|end|>{% endgen", "{% endgen", 1).replace("eration %}{% else", "eration %}<|end|>{% else"),
        )
        == "unmarked_turn"
    )
    thinks = marked.replace("{% generation %}", "<think></think>{% generation %}")
    assert refused(tokenizer, [ASK, ANSWER], thinks) == "unmarked_turn"


def test_a_prompt_that_is_rendered_otherwise_once_answered_is_trained_as_served(tokenizer: Any) -> None:
    """Hermes' results: closed only when another message follows."""
    template = BODY.replace("<|end|>\n", "{% if m.role != 'tool' or not loop.last %}<|end|>\n{% endif %}")
    talk = [ASK, ANSWER, RESULT, ANSWER]
    served = tokenizer.apply_chat_template(talk[:3], chat_template=template, add_generation_prompt=True, tokenize=False)
    assert served.endswith("<|tool|>\nrang<|assistant|>\n")
    assert trained(tokenizer, talk, template) == [
        (served[: len("<|user|>\nq<|end|>\n<|assistant|>\n")], "a<|end|>a<|end|>")
    ]


def test_the_date_is_one_whenever_it_runs(tokenizer: Any) -> None:
    dated = "<|system|>\n{{ strftime_now('%d %b %Y') }}<|end|>\n" + BODY
    (rendering,) = render_conversation([ASK, ANSWER], tokenizer, dated)
    assert rendering.text.startswith("<|system|>\n01 Jan 2026<|end|>\n")
    (rendering,) = render_conversation([ASK, ANSWER], tokenizer, bind_template(dated, {"strftime_date": "2026-11-28"}))
    assert rendering.text.startswith("<|system|>\n28 Nov 2026<|end|>\n")


def test_a_kind_that_is_refused_is_said_once_with_what_helps(tokenizer: Any) -> None:
    origin = {"dataset": "d", "file": "f", "row_number": 3}
    rows = [{"messages": [ASK, ANSWER], **origin}, *({"messages": [ASK, THOUGHT], **origin} for _ in range(5))]
    template = bind_template(THINKS, {"enable_thinking": False})
    tokenizer.chat_template = template
    (line,) = prove_rows(rows, tokenizer, tokenizer, template)
    assert line.startswith("rows are set aside by the chat template; served_prompt: d, f, row 3: message 1: ")
    assert line.endswith(". With pack.template_kwargs: {enable_thinking: true} it is rendered")
    tokenizer.chat_template = BODY
    (line,) = prove_rows(rows, tokenizer, tokenizer, BODY)
    assert line.endswith(". With pack.reasoning: drop it is rendered")


def test_what_a_message_cannot_hold_is_refused(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert trained(tokenizer, [ASK, {**ANSWER, "content": parts}], BODY)[0][1] == "ab<|end|>"
    assert refused(tokenizer, [ASK, {**ANSWER, "content": [{"type": "image"}]}], BODY) == "content_part"
    assert refused(tokenizer, [ASK, {**ANSWER, "refusal": "no"}], BODY) == "unknown_key"
    for name in ("thinking", "reasoning"):
        assert trained(tokenizer, [ASK, {**ANSWER, name: "t"}], THINKS) == trained(tokenizer, [ASK, THOUGHT], THINKS)


def test_the_last_answer_only(tokenizer: Any) -> None:
    talk = [ASK, {**ANSWER, "content": "first"}, ASK, ANSWER]
    last = bind_template(BODY, {"last_answer_only": True})
    assert [text for _, text in trained(tokenizer, talk, last)] == ["a<|end|>"]
    ((_, both),) = trained(tokenizer, talk, BODY)
    assert both == "first<|end|>a<|end|>"
    assert encode_conversation([*talk[:3], {**ANSWER, "weight": 0}], tokenizer, last)[0].labels.count(IGNORE_INDEX) > 20


def test_a_variable_that_the_template_does_not_have_is_refused() -> None:
    """A misspelt one would change nothing, in silence."""

    def template(**values: Any) -> str:
        return template_of(PackConfig(chat_template="chatml", template_kwargs=values))

    for name in ("enable_thinkin", "strftime_date", "drop_reasoning"):
        with pytest.raises(RecipeError, match=f"pack.template_kwargs: '{name}' is no variable of the chat template"):
            template(**{name: "2026-01-01"})
    assert template() == load_chat_template("chatml")
    assert "{% set eos_like = false %}" in bind_template("{{ eos_like }}", {"eos_like": False})


def test_rows_whose_answers_merge_with_their_prompts_are_held_against_the_saved_tokenizer_too(tokenizer: Any) -> None:
    row = {"messages": [ASK, {**ANSWER, "content": "\na"}], "dataset": "d", "file": "f", "row_number": 3}
    tokenizer.chat_template = BODY
    assert prove_rows([row] * 3, tokenizer, tokenizer, BODY) == []
    tokenizer.chat_template = BODY.replace("<|user|>", "<|system|>").replace("{{ m.role }}", "{{ 'system' }}")
    with pytest.raises(DataError, match="d, f, row 3: training would see other tokens than serving: from token 0 on"):
        prove_rows([row] * 3, tokenizer, tokenizer, BODY)
