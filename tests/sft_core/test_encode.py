"""Ids and labels, token by token, with a tokenizer of a few words."""

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sft_core.errors import DataError, ModelError, RecipeError, RowError
from sft_core.pack import IGNORE_INDEX as NO
from sft_core.pack import Sequence, encode_conversation, encode_messages, load_chat_template
from sft_core.pack.encoding import tokenize
from sft_core.pack.rendering import render_conversation

WORDS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "\n", "user", "assistant", "hi", "yes", "no", "bye", "#"]
WORDS += ["<", "|", ">", "/", "s", "im_end", "Human", "Assistant", ":", "text", "tool"]
UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # keeps thoughts (`thought # answer`) of the last turn only, as thinking models' templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content ~ ' # ' if loop.last and m.reasoning_content }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes no"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    chat = [AddedToken(word, special=True) for word in WORDS[3:5]]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": chat})
    assert len(made) == len(WORDS)
    return made


def test_answer_and_end_token_are_trained(tokenizer: Any) -> None:
    sequence = encode_messages([ASK, ANSWER], tokenizer, load_chat_template("chatml"))
    assert sequence == Sequence(
        #          user \n hi end \n start assistant \n yes no end \n
        input_ids=[3, 6, 5, 8, 4, 5, 3, 7, 5, 9, 10, 4, 5],
        labels=[NO] * 9 + [9, 10, 4, NO],
    )


def test_plain_as_in_the_docstring(tokenizer: Any) -> None:
    messages = [ASK, {"role": "assistant", "content": "yes"}]
    sequence = encode_messages(messages, tokenizer, load_chat_template("plain"))
    assert sequence.input_ids == [12, 12, 12, 19, 21, 8, 5, 12, 12, 12, 20, 21, 9, 2, 5]
    assert sequence.labels == [NO] * 12 + [9, 2, NO]


def test_truncation_and_padding_of_the_tokenizers_own_are_left_out(tokenizer: Any) -> None:
    own = make_tokenizer()
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=20)
    template = load_chat_template("chatml")
    assert encode_messages([ASK, ANSWER], own, template) == encode_messages([ASK, ANSWER], tokenizer, template)


class Recording:
    """The Rust half of a tokenizer, with the names of what was asked of it."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.asked = backend, list[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self._backend, name)


def test_settings_that_are_right_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are behind a lock that a batch holds to its end: whoever sets them waits for other threads' batches."""
    own = make_tokenizer()
    recording = Recording(own.backend_tokenizer)
    rendered = render_conversation([ASK, ANSWER], own, load_chat_template("chatml"))
    monkeypatch.setattr(type(own), "backend_tokenizer", property(lambda _: recording))
    recording.enable_truncation(3)
    for times in (1, 1):
        assert len(tokenize(rendered, own)[0].ids) > 3
        assert recording.asked.count("no_truncation") == times
    assert any(name.startswith("encode_batch") for name in recording.asked)


def test_prefix_difference_gives_the_same_as_marks(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "no"}, ASK, ANSWER, ASK, ANSWER]
    assert encode_messages(messages, tokenizer, UNMARKED) == encode_messages(
        messages, tokenizer, load_chat_template("chatml")
    )


@pytest.mark.parametrize("template", ["chatml", UNMARKED])
def test_weight_zero_is_read_not_trained(tokenizer: Any, template: str) -> None:
    template = load_chat_template(template) if template == "chatml" else template
    messages = [ASK, {**ANSWER, "weight": 0}, ASK, {"role": "assistant", "content": "bye", "weight": 1}]
    labels = encode_messages(messages, tokenizer, template).labels
    assert [label for label in labels if label != NO] == [11, 4]
    every_zero = [ASK, {**ANSWER, "weight": 0}]
    assert set(encode_messages(every_zero, tokenizer, template).labels) == {NO}


def test_weight_none_on_an_answer_is_one(tokenizer: Any) -> None:
    messages = [{**ASK, "weight": None}, {**ANSWER, "weight": None}]
    assert encode_messages(messages, tokenizer, UNMARKED) == encode_messages([ASK, ANSWER], tokenizer, UNMARKED)


def test_first_label_is_never_trained(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}]
    template = (
        "{% for m in messages %}{% generation %}{{ m.content ~ eos_token if m.content }}{% endgeneration %}{% endfor %}"
    )
    assert encode_messages(messages, tokenizer, template) == Sequence([9, 2], [NO, 2])


@pytest.mark.parametrize("template", ["chatml", UNMARKED])
def test_typed_special_tokens_are_text(tokenizer: Any, template: str) -> None:
    template = load_chat_template(template) if template == "chatml" else template
    typed = [{"role": "user", "content": "hi <|im_end|></s>"}, {"role": "assistant", "content": "yes<s>"}]
    assert [rendering.typed for rendering in render_conversation(typed, tokenizer, template)] == [True]
    sequence = encode_messages(typed, tokenizer, template)
    spelled = [13, 14, 18, 14, 15, 13, 16, 17, 15]  # < | im_end | > < / s >
    assert sequence.input_ids == [3, 6, 5, 8, *spelled, 4, 5, 3, 7, 5, 9, 13, 17, 15, 4, 5]
    assert sequence.labels == [NO] * 18 + [9, 13, 17, 15, 4, NO]


def test_the_way_for_typed_text_reads_ordinary_text_alike(tokenizer: Any) -> None:
    from sft_core.pack.controls import controls_of

    (rendering,) = render_conversation([ASK, ANSWER], tokenizer, load_chat_template("internlm2_chat"))
    controls = controls_of(tokenizer)
    encoding = controls.encoding_of_cloaked(rendering.text)
    encoded = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
    assert controls.ids_of_cloaked(encoding) == encoded["input_ids"]
    assert encoding.offsets == encoded["offset_mapping"]


def test_private_use_text_beside_special_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="private_use_text"):
        encode_messages([{"role": "user", "content": "\U000f0000 </s>"}, ANSWER], tokenizer, UNMARKED)


def test_ids_equal_apply_chat_template(tokenizer: Any) -> None:
    for name in ("chatml", "internlm2_chat", "qwen_chat", "default"):
        template = load_chat_template(name)
        encoded = tokenizer.apply_chat_template(
            [ASK, ANSWER], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        sequence = encode_messages([ASK, ANSWER], tokenizer, template)
        assert sequence.input_ids == encoded["input_ids"]
        if name != "plain":  # its marks begin with a space, which this tokenizer drops; HF's mask is then empty
            assert [int(label != NO) for label in sequence.labels] == encoded["assistant_masks"]


def test_rewriting_template_gives_a_sequence_a_turn(tokenizer: Any) -> None:
    messages = [
        ASK,
        {"role": "assistant", "content": "yes", "reasoning_content": "no"},
        ASK,
        {"role": "assistant", "content": "bye", "reasoning_content": "no"},
    ]
    first, second = encode_conversation(messages, tokenizer, FORGETFUL)
    assert first == Sequence(
        [3, 6, 5, 8, 4, 5, 3, 7, 5, 10, 12, 9, 4, 5],
        [NO] * 9 + [10, 12, 9, 4, NO],  # trained with its thought
    )
    assert second.input_ids[:13] == [3, 6, 5, 8, 4, 5, 3, 7, 5, 9, 4, 5, 3]  # the thought is gone from the past
    assert [label for label in second.labels if label != NO] == [10, 12, 11, 4]
    with pytest.raises(DataError, match="makes 2 sequences"):
        encode_messages(messages, tokenizer, FORGETFUL)


def test_text_is_trained_whole_and_ends_with_eos(tokenizer: Any) -> None:
    messages = [{"role": "text", "content": "hi yes </s>"}]
    assert encode_messages(messages, tokenizer, "unused") == Sequence(
        [8, 9, 13, 16, 17, 15, 2], [NO, 9, 13, 16, 17, 15, 2]
    )


def test_text_begins_with_bos_where_the_tokenizer_writes_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert encode_messages([{"role": "text", "content": "hi"}], tokenizer, "unused") == Sequence([1, 8, 2], [NO, 8, 2])


def test_two_bos_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'<s>' twice"):
        encode_messages([ASK, ANSWER], tokenizer, "{{ bos_token }}" + load_chat_template("default"))


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([], UNMARKED, "empty_conversation"),
        ([ASK, {"role": "text", "content": "x"}], UNMARKED, "mixed_text"),
        ([{"role": "critic", "content": "x"}, ANSWER], "plain", "template_error"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f"}]}], UNMARKED, "tool_calls"),
        ([ASK, ANSWER], "{{ messages|length }}{{ messages[-1].content }}", "rewritten_prompt"),
        (
            [ASK, ANSWER],
            "{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            "lost_text",
        ),
        ([ASK, ANSWER], UNMARKED + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "unmarked_turn"),
        ([ASK, ANSWER], "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", "no_stop"),
        ([ASK, {"role": "assistant", "content": "yes", "reasoning_content": "no"}], UNMARKED, "lost_thought"),
        ([ANSWER, ASK, ANSWER], "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "assistant_first"),
        (
            [ASK, ANSWER],
            UNMARKED + "{% if add_generation_prompt %}#{% endif %}",
            "served_prompt",
        ),
    ],
)
def test_refused_rows_say_why(tokenizer: Any, messages: list[dict[str, Any]], template: str, reason: str) -> None:
    template = load_chat_template(template) if template == "plain" else template
    with pytest.raises(RowError) as caught:
        encode_conversation(messages, tokenizer, template)
    assert caught.value.reason == reason


def test_broken_template_names_its_line(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="line 2: not Jinja"):
        encode_messages([ASK, ANSWER], tokenizer, "hello\n{% for %}")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "slow/model"

    with pytest.raises(ModelError, match="slow/model: Slow is not a fast tokenizer"):
        encode_messages([ASK, ANSWER], Slow(), UNMARKED)
