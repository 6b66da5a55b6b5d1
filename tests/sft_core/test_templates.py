"""Some shipped chat templates against texts written by hand, how a template is found, and by what its answers end.

All of XTuner's are in test_templates_xtuner.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sft_core.errors import ModelError, RecipeError, RowError
from sft_core.pack import load_chat_template, shipped_templates
from sft_core.pack.rendering import render_conversation
from sft_core.pack.stops import stop_token_ids
from sft_core.pack.template import compiled_template

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
CHATML = (
    "<|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
)
MISTRAL = "<s>[INST] S [/INST]\n[INST] q1 [/INST]a1</s>\n<s>[INST] q2 [/INST]a2</s>\n"
TEXTS = {
    "chatml": CHATML,
    "default": "<s><|System|>:S\n<|User|>:q1\n<|Bot|>:a1</s>\n<s><|User|>:q2\n<|Bot|>:a2</s>\n",
    "gemma": (
        "<s><start_of_turn>system\nS<end_of_turn>\n"
        "<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn></s>\n"
        "<s><start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn></s>\n"
    ),
    "internlm2_chat": "<s>" + CHATML,
    "llama3_chat": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>"
    ),
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "phi3_chat": (
        "<|system|>\nS<|end|>\n<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n"
        "<|user|>\nq2<|end|>\n<|assistant|>\na2<|end|>\n"
    ),
    "plain": "### System: S\n### Human: q1\n### Assistant: a1</s>\n### Human: q2\n### Assistant: a2</s>\n",
    "qwen_chat": CHATML,
    "zephyr": "<s><|system|>\nS\n<|user|>\nq1\n<|assistant|>\na1</s>\n<s><|user|>\nq2\n<|assistant|>\na2</s>\n",
}
ENDS = {
    "default": "</s>",
    "gemma": "<end_of_turn></s>",
    "llama3_chat": "<|eot_id|>",
    "mistral": "</s>",
    "mixtral": "</s>",
    "phi3_chat": "<|end|>",
    "plain": "</s>",
    "zephyr": "</s>",
}
PROMPTS = {
    "default": "<|Bot|>:",
    "gemma": "<start_of_turn>model\n",
    "llama3_chat": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "mixtral": "",
    "phi3_chat": "<|assistant|>\n",
    "plain": "### Assistant:",
    "zephyr": "<|assistant|>\n",
}


def make_tokenizer(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens have the ids 1, 2, ... in order; everything else is 0."""
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(["?", *special])}, unk_token="?"))
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture(scope="module")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")


def render(name: str, messages: list[dict[str, str]], **options: bool) -> tuple[str, list[tuple[int, int]]]:
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=load_chat_template(name),
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return texts[0], marks[0]


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    assert render(name, MESSAGES)[0] == TEXTS[name]


WITH_THE_SPACE_BEFORE = {"plain", "deepseek_v2"}
"""Tokenizers join that space to the answer's first word, so the prompt ends before it and it is trained."""


@pytest.mark.parametrize("name", TEXTS)
def test_marks_hold_the_answer_and_its_end_token(name: str) -> None:
    text, marks = render(name, MESSAGES)
    end = ENDS.get(name, "<|im_end|>")
    space = " " if name in WITH_THE_SPACE_BEFORE else ""
    assert [text[start:stop] for start, stop in marks] == [f"{space}a1{end}", f"{space}a2{end}"]


@pytest.mark.parametrize("name", TEXTS)
def test_generation_prompt_is_what_stands_before_an_answer(name: str) -> None:
    prompt = PROMPTS.get(name, "<|im_start|>assistant\n")
    text, _ = render(name, MESSAGES[:2], add_generation_prompt=True)
    assert text.endswith(prompt)
    assert TEXTS[name].startswith(text + (" " if name in WITH_THE_SPACE_BEFORE else "") + "a1")


def test_bos_is_written_for_models_that_have_it_only() -> None:
    without = {name for name in shipped_templates() if not render(name, MESSAGES[1:])[0].startswith("<s>")}
    assert without == {"chatml", "phi3_chat", "plain", "qwen_chat"}


def test_a_system_message_where_there_is_no_place_for_it(tiny_tokenizer: Any) -> None:
    with pytest.raises(RowError, match="template_error: .*minicpm has no text for the role system: let the map_fn"):
        render_conversation(MESSAGES, tiny_tokenizer, load_chat_template("minicpm"))


@pytest.mark.parametrize("name", [name for name in shipped_templates() if name not in ("chatml", "llama3_chat")])
def test_unknown_roles_are_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="has no text for the role tool"):
        render(name, [*MESSAGES[1:], {"role": "tool", "content": "t"}])


def test_typo_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no chat template 'lama3_chat': did you mean 'llama3_chat'"):
        load_chat_template("lama3_chat")


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}")
    assert load_chat_template(str(path)) == "{{ messages }}"


class Tokenizer:
    name_or_path = "some/model"

    def __init__(self, chat_template: str | dict[str, str] | None) -> None:
        self.chat_template = chat_template


def test_the_tokenizers_own() -> None:
    assert load_chat_template(None, Tokenizer("own")) == "own"
    assert load_chat_template(None, Tokenizer({"default": "d", "tool_use": "t"})) == "d"


def test_none_without_one_names_the_shipped() -> None:
    with pytest.raises(RecipeError, match=r"some/model has no chat template.*chatml, .*default, .*plain"):
        load_chat_template(None, Tokenizer(None))
    with pytest.raises(RecipeError, match="null"):
        load_chat_template(None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gemma", [2, 1]), ("qwen_chat", [3, 1]), ("mistral", [1]), ("llama3_chat", [1])],
    ids=["two behind the answer", "not eos", "eos", "eos, as <|eot_id|> is no token of this tokenizer"],
)
def test_stop_tokens(name: str, expected: list[int]) -> None:
    tokenizer = make_tokenizer(["</s>", "<end_of_turn>", "<|im_end|>"], eos_token="</s>")
    assert stop_token_ids(tokenizer, load_chat_template(name)) == expected


def test_stop_tokens_without_marks_and_without_a_place_for_the_probe() -> None:
    tokenizer = make_tokenizer(["</s>", "<end>"], eos_token="</s>")
    assert stop_token_ids(tokenizer, "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}") == [2, 1]
    assert stop_token_ids(tokenizer, "{{ raise_exception('never') }}") == [1]
    with pytest.raises(ModelError, match="no token ends an answer: .*set one in tokenizer_config.json"):
        stop_token_ids(make_tokenizer(["<end>"]), load_chat_template("chatml"))


@pytest.mark.parametrize(
    ("model", "template", "expected"),
    [
        ("minimind-tokenizer", None, ["<|im_end|>"]),
        ("minimind-tokenizer", "qwen_chat", ["<|im_end|>"]),
        ("stories260K", "plain", ["</s>"]),
        ("stories260K", "mistral", ["</s>"]),
    ],
)
def test_stop_tokens_of_real_tokenizers(model: str, template: str | None, expected: list[str]) -> None:
    path = Path(__file__).parents[2].parent / "shared" / "models" / model
    if not path.exists():
        pytest.skip(f"no {path}: this test wants a real tokenizer from the project's shared folder")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = stop_token_ids(tokenizer, load_chat_template(template, tokenizer))
    assert tokenizer.convert_ids_to_tokens(ids) == expected


@pytest.mark.parametrize("name", [*shipped_templates(), "thoughts"])
def test_rendering_is_that_of_transformers(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    thoughts = "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{{ tools }}{{ documents }}{% endfor %}"
    template = thoughts if name == "thoughts" else load_chat_template(name)
    thinking = {"role": "assistant", "content": "a", "thinking": "t"}
    compiled = compiled_template(template, tiny_tokenizer)
    refused = 0
    for chat, prompt in (
        (MESSAGES, False),
        (MESSAGES[1:], False),
        (MESSAGES[1:4], True),
        ([MESSAGES[1], thinking], False),
    ):
        options: dict[str, Any] = {"tools": [{"name": "f"}] if prompt else None, "add_generation_prompt": prompt}
        try:
            plain = tiny_tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
        except TemplateError as error:
            refused += 1
            with pytest.raises(TemplateError, match=re.escape(str(error))):
                compiled.render(chat, options["tools"], prompt)
            continue
        texts, marks = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=compiled.marked,
            **tiny_tokenizer.special_tokens_map,
            **options,
        )
        assert texts == [plain]
        assert compiled.render(chat, options["tools"], prompt) == (plain, marks[0] if marks else [])
    assert refused <= 1
