"""Chat templates: Jinja texts in Hugging Face's dialect, found by name.

In: a shipped name (`templates/*.jinja` or an alias), a path to a Jinja file, or None for the tokenizer's own. Out: the
text, and the tokens by which an answer rendered with it ends.

Shipped are `chatml`, `plain` and XTuner's 27 names with XTuner's text (`xtuner/utils/templates.py`, v0.2.0). BOS stands
where XTuner's `encode_fn` has it: at the start, and again behind each eos. Exceptions: phi3_chat follows Phi-3's own
template, and qwen_chat never has one. Two things differ on purpose: a text is tokenised in one piece, as it is served
(XTuner does it part by part), and special tokens typed into a content stay text.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from sft_core.errors import ModelError, RecipeError, RowError
from sft_core.pack.controls import controls_of
from sft_core.pack.rendering import render_conversation

SUFFIX = ".jinja"
ALIASES = {
    "deepseek_moe": "mistral",
    "deepseekcoder": "deepseek_coder",
    "minicpm3": "internlm2_chat",
    "mixtral": "mistral",
    "wizardlm": "vicuna",
}
"""XTuner's names whose text is that of another one."""
PROBE_ANSWER = "pong"
PROBE = ({"role": "user", "content": "ping"}, {"role": "assistant", "content": PROBE_ANSWER})


def load_chat_template(name: str | None, tokenizer: Any = None) -> str:
    """Text of the chat template `name`; None takes the tokenizer's own. RecipeError if there is none."""
    if name is None:
        return _own_template(tokenizer)
    shipped = shipped_templates()
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"pack.chat_template {path}: cannot be read: {error}") from None
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(
        f"no chat template {name!r}: {hint}shipped are {', '.join(shipped)}; "
        f"or give a Jinja file (there is none at {path.absolute()})"
    )


def shipped_templates() -> dict[str, str]:
    """Text of every chat template that comes with the project, by name."""
    folder = resources.files("sft_core.pack").joinpath("templates")
    files = [file for file in folder.iterdir() if file.name.endswith(SUFFIX)]
    texts = {file.name.removesuffix(SUFFIX): file.read_text("utf-8") for file in files}
    texts |= {alias: texts[name] for alias, name in ALIASES.items()}
    return dict(sorted(texts.items()))


def stop_token_ids(tokenizer: Any, chat_template: str) -> list[int]:
    """Ids by which an answer is over, for `eos_token_id` of generation_config.json: the special tokens that the
    template writes behind an answer, then eos. ModelError if there is none of either.

    With `gemma` that is `[<end_of_turn>, <eos>]`, with `qwen_chat` on a base model `[<|im_end|>, <|endoftext|>]`.
    """
    ids = tokenizer(_behind_an_answer(tokenizer, chat_template), add_special_tokens=False).input_ids
    special = [token for token in ids if token in controls_of(tokenizer).id_set]
    ends = special or [token for token in ids if token in tokenizer.added_tokens_decoder]
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ModelError(
            f"{tokenizer.name_or_path}: no token ends an answer: the chat template writes none behind it, and the "
            "tokenizer has no eos_token; set one in tokenizer_config.json"
        )
    return list(dict.fromkeys(ends))


def _behind_an_answer(tokenizer: Any, chat_template: str) -> str:
    """What is trained behind the content of an answer; empty if the template does not take the probe."""
    try:
        (rendering,) = render_conversation(PROBE, tokenizer, chat_template)
    except RowError:
        return ""
    trained = "".join(rendering.text[span.start : span.end] for span in rendering.spans)
    return trained.rpartition(PROBE_ANSWER)[2] if PROBE_ANSWER in trained else ""


def _own_template(tokenizer: Any) -> str:
    names = ", ".join(shipped_templates())
    if tokenizer is None:
        raise RecipeError(
            f"pack.chat_template is null: that takes the tokenizer's own, and there is none here; or {names}"
        )
    own = tokenizer.chat_template
    if isinstance(own, dict):  # named templates, as in Hermes: the plain one
        own = own.get("default")
    if not own:
        where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise RecipeError(
            f"{where} has no chat template of its own: set pack.chat_template to a Jinja file or one of {names}. "
            "`plain` suits a base model without chat tokens"
        )
    return str(own)
