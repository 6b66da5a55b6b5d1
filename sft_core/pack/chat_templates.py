"""Chat templates: Jinja texts in Hugging Face's dialect, found by name.

In: a shipped name (`templates/*.jinja` or an alias), a path to a Jinja file, or None for the tokenizer's own; values of
its variables. Out: the text.

Shipped are `chatml`, `plain` and XTuner's 27 names with XTuner's text (`xtuner/utils/templates.py`, v0.2.0). BOS stands
where XTuner's `encode_fn` has it: at the start, and again behind each eos. Exceptions: phi3_chat follows Phi-3's own
template, and qwen_chat never has one. Two things differ on purpose: a text is tokenised in one piece, as it is served
(XTuner does it part by part), and special tokens typed into a content stay text.
"""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.pack.template import DROP_REASONING, LAST_ANSWER_ONLY, STRFTIME_DATE, bind_template
from sft_core.recipe import PackConfig

SUFFIX = ".jinja"
ALIASES = {
    "deepseek_moe": "mistral",
    "deepseekcoder": "deepseek_coder",
    "minicpm3": "internlm2_chat",
    "mixtral": "mistral",
    "wizardlm": "vicuna",
}
"""XTuner's names whose text is that of another one."""


def template_of(config: PackConfig, tokenizer: Any = None) -> str:
    """The recipe's chat template with the values of its variables in it. RecipeError if there is none."""
    own = {DROP_REASONING: config.reasoning == "drop", LAST_ANSWER_ONLY: config.train_on == "last"}
    chosen = {name: value for name, value in own.items() if value}
    text = load_chat_template(config.chat_template, tokenizer)
    for name in config.template_kwargs:
        read = "strftime_now" if name == STRFTIME_DATE else name
        if name in own or re.search(rf"\b{re.escape(read)}\b", text) is None:
            raise RecipeError(
                f"pack.template_kwargs: {name!r} is no variable of the chat template, and would change nothing. Those "
                f"of many templates are enable_thinking, thinking and date_string; {STRFTIME_DATE} is for templates "
                "that print the date"
            )
    return bind_template(text, {**config.template_kwargs, **chosen})


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
