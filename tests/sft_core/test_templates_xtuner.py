"""XTuner's 27 chat templates against XTuner's own table and rule, written down here a second time.

The table is `PROMPT_TEMPLATE` of InternLM/xtuner v0.2.0, the rule that of its `template_map_fn` and `encode_fn`:
[bos] SYSTEM INSTRUCTION output SUFFIX [eos] SEP a turn, bos where a turn is the first or the last one ended with eos.
"""

from dataclasses import dataclass

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sft_core.pack import load_chat_template, shipped_templates

SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature."
)
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
DEEPSEEK = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeekCompany, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer. "
)
DESCRIBED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


@dataclass(frozen=True)
class Entry:
    system: str | None
    instruction: str
    sep: str = ""
    suffix: str = ""
    suffix_as_eos: bool = False


CHATML = Entry(
    "<|im_start|>system\n{system}<|im_end|>\n",
    "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "\n",
    "<|im_end|>",
    True,
)
MISTRAL = Entry("[INST] {system} [/INST]\n", "[INST] {input} [/INST]", "\n")
VICUNA = Entry(CURIOUS + "{system}\n ", "USER: {input} ASSISTANT:", "\n")
CODER = Entry(DEEPSEEK + "{system}\n", "### Instruction:\n{input}\n### Response:\n", "\n")
XTUNER = {
    "default": Entry("<|System|>:{system}\n", "<|User|>:{input}\n<|Bot|>:", "\n"),
    "zephyr": Entry("<|system|>\n{system}\n", "<|user|>\n{input}\n<|assistant|>\n", "\n"),
    "internlm_chat": Entry("<|System|>:{system}\n", "<|User|>:{input}<eoh>\n<|Bot|>:", "\n", "<eoa>", True),
    "internlm2_chat": CHATML,
    "moss_sft": Entry("{system}\n", "<|Human|>: {input}<eoh>\n", "\n"),
    "llama2_chat": Entry(
        "[INST] <<SYS>>\n " + SAFETY + "\n{system}\n<</SYS>>\n [/INST] ", "[INST] {input} [/INST]", "\n"
    ),
    "code_llama_chat": Entry("{system}\n", "[INST] {input} [/INST]"),
    "chatglm2": Entry("{system}\n", "[Round {round}]\n\n问：{input}\n\n答：", "\n\n"),
    "chatglm3": Entry("<|system|>\n{system}", "<|user|>\n{input}<|assistant|>\n", "\n"),
    "qwen_chat": CHATML,
    "baichuan_chat": Entry("{system}\n", "<reserved_102>{input}<reserved_103>", "\n"),
    "baichuan2_chat": Entry("{system}\n", "<reserved_106>{input}<reserved_107>", "\n"),
    "wizardlm": VICUNA,
    "wizardcoder": Entry(DESCRIBED + "{system}\n ", "### Instruction:\n{input}\n\n### Response:", "\n\n"),
    "vicuna": VICUNA,
    "deepseek_coder": CODER,
    "deepseekcoder": CODER,
    "deepseek_moe": MISTRAL,
    "deepseek_v2": Entry(
        "{system}\n\n", "User: {input}\n\nAssistant: ", suffix="<｜end▁of▁sentence｜>", suffix_as_eos=True
    ),
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "minicpm": Entry(None, "<用户> {input} <AI>", "\n"),
    "minicpm3": CHATML,
    "gemma": Entry(
        "<start_of_turn>system\n{system}<end_of_turn>\n",
        "<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
        "\n",
        "<end_of_turn>",
    ),
    "cohere_chat": Entry(
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{input}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "",
        "<|END_OF_TURN_TOKEN|>",
        True,
    ),
    "llama3_chat": Entry(
        "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
        "<|eot_id|>",
        True,
    ),
    "phi3_chat": Entry(
        "<|system|>\n{system}<|end|>\n", "<|user|>\n{input}<|end|>\n<|assistant|>\n", "\n", "<|end|>", True
    ),
}
WITHOUT_BOS = {"qwen_chat", "phi3_chat"}
"""XTuner writes none for Qwen's tokenizers; phi3_chat follows Phi-3's own template."""
Turn = dict[str, str]
TURNS = [{"system": "Be {kind}.", "input": "q1", "output": " a1 "}, {"input": "q2\n", "output": "a2"}]
LATE_SYSTEM = [{"input": "", "output": "a1"}, {"system": "S2", "input": "q2", "output": "a2"}]


def oracle(name: str, turns: list[Turn], bos: str) -> tuple[str, list[str]]:
    """XTuner's text of `turns`, and the trained part of each."""
    entry, text, trained = XTUNER[name], "", []
    eos = "" if entry.suffix_as_eos else "</s>"
    for number, turn in enumerate(turns, 1):
        opening = bos if number == 1 or eos else ""
        system = (entry.system or "").replace("{system}", turn["system"]) if turn.get("system") else ""
        request = entry.instruction.replace("{round}", str(number)).replace("{input}", turn["input"])
        trained.append(turn["output"] + entry.suffix + eos)
        text += opening + system + request + trained[-1] + entry.sep
    return text, trained


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    roles = {"system": "system", "input": "user", "output": "assistant"}
    return [{"role": roles[key], "content": turn[key]} for turn in turns for key in roles if key in turn]


def render(name: str, messages: list[dict[str, str]], **options: str | bool) -> tuple[str, list[str]]:
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=load_chat_template(name),
        return_assistant_tokens_mask=True,
        eos_token="</s>",
        **options,
    )
    return texts[0], [texts[0][start:end] for start, end in marks[0]]


def without_system(name: str, turns: list[Turn]) -> list[Turn]:
    """The turns as `name` takes them: minicpm has no system text."""
    return [{k: v for k, v in turn.items() if k != "system" or XTUNER[name].system} for turn in turns]


SPACE_BEFORE = {"deepseek_v2": " "}
"""Ours to train: XTuner's prompt ends in this space, which tokenizers join to the answer's first word."""


def test_all_27_are_shipped_and_three_more() -> None:
    assert len(XTUNER) == 27
    assert shipped_templates().keys() == XTUNER.keys() | {"chatml", "deepseek_r1", "plain"}


@pytest.mark.parametrize("given", [TURNS, LATE_SYSTEM], ids=["system first", "system late, empty request"])
@pytest.mark.parametrize("bos", ["<s>", ""])
@pytest.mark.parametrize("name", XTUNER)
def test_text_and_trained_parts_are_xtuners(name: str, bos: str, given: list[Turn]) -> None:
    turns = without_system(name, given)
    special = {"bos_token": bos} if bos else {}  # a tokenizer without BOS leaves the name undefined
    written = "" if name in WITHOUT_BOS else bos
    text, trained = oracle(name, turns, written)
    assert render(name, messages_of(turns), **special) == (
        text,
        [SPACE_BEFORE.get(name, "") + part for part in trained],
    )


@pytest.mark.parametrize("name", XTUNER)
def test_generation_prompt_is_what_stands_before_an_answer(name: str) -> None:
    turns = without_system(name, TURNS)
    whole, trained = oracle(name, turns, "" if name in WITHOUT_BOS else "<s>")
    for count, answer in zip((1, 2), trained, strict=True):
        messages = messages_of(turns[:count])[:-1]
        prompt, _ = render(name, messages, bos_token="<s>", add_generation_prompt=True)
        assert whole.startswith(prompt + SPACE_BEFORE.get(name, "") + answer)


def test_the_oracle_itself_by_hand() -> None:
    """What XTuner's `encode_fn` gave when it was run: bos and eos every turn, or one bos in all."""
    assert oracle("mistral", TURNS, "<s>")[0] == (
        "<s>[INST] Be {kind}. [/INST]\n[INST] q1 [/INST] a1 </s>\n<s>[INST] q2\n [/INST]a2</s>\n"
    )
    assert oracle("deepseek_v2", TURNS, "<s>")[0] == (
        "<s>Be {kind}.\n\nUser: q1\n\nAssistant:  a1 <｜end▁of▁sentence｜>"
        "User: q2\n\n\nAssistant: a2<｜end▁of▁sentence｜>"
    )
    assert oracle("chatglm2", LATE_SYSTEM, "")[0] == (
        "[Round 1]\n\n问：\n\n答：a1</s>\n\nS2\n[Round 2]\n\n问：q2\n\n答：a2</s>\n\n"
    )
