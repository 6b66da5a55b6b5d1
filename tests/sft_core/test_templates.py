"""Shipped chat templates against literal texts, and how a template is found."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sft_core.errors import RecipeError
from sft_core.pack import load_chat_template, shipped_templates

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
MISTRAL = "<s>[INST] S [/INST]\n[INST] q1 [/INST]a1</s>\n[INST] q2 [/INST]a2</s>\n"
TEXTS = {
    "chatml": CHATML,
    "default": "<s><|System|>:S\n<|User|>:q1\n<|Bot|>:a1</s>\n<|User|>:q2\n<|Bot|>:a2</s>\n",
    "gemma": (
        "<s><start_of_turn>system\nS<end_of_turn>\n"
        "<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn></s>\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn></s>\n"
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
    "zephyr": "<s><|system|>\nS\n<|user|>\nq1\n<|assistant|>\na1</s>\n<|user|>\nq2\n<|assistant|>\na2</s>\n",
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
    "plain": "### Assistant: ",
    "zephyr": "<|assistant|>\n",
}


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


def test_every_shipped_template_is_tested() -> None:
    assert shipped_templates().keys() == TEXTS.keys()


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    assert render(name, MESSAGES)[0] == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_marks_hold_the_answer_and_its_end_token(name: str) -> None:
    text, marks = render(name, MESSAGES)
    end = ENDS.get(name, "<|im_end|>")
    assert [text[start:stop] for start, stop in marks] == [f"a1{end}", f"a2{end}"]


@pytest.mark.parametrize("name", TEXTS)
def test_generation_prompt_is_what_stands_before_an_answer(name: str) -> None:
    prompt = PROMPTS.get(name, "<|im_start|>assistant\n")
    text, _ = render(name, MESSAGES[:2], add_generation_prompt=True)
    assert text.endswith(prompt)
    assert TEXTS[name].startswith(text + "a1")


def test_bos_is_written_for_models_that_have_it_only() -> None:
    with_bos = {name for name in TEXTS if render(name, MESSAGES)[0].startswith("<s>")}
    assert with_bos == {"default", "gemma", "internlm2_chat", "llama3_chat", "mistral", "mixtral", "zephyr"}


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
    with pytest.raises(RecipeError, match=r"some/model has no chat template.*chatml, default, .*plain"):
        load_chat_template(None, Tokenizer(None))
    with pytest.raises(RecipeError, match="null"):
        load_chat_template(None)
