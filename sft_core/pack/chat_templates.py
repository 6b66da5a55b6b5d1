"""Chat templates: Jinja texts in Hugging Face's dialect, found by name.

In: a shipped name (`templates/*.jinja`), a path to a Jinja file, or None for the tokenizer's own. Out: the text.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError

SUFFIX = ".jinja"


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
    files = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return {f.name.removesuffix(SUFFIX): f.read_text("utf-8") for f in files if f.name.endswith(SUFFIX)}


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
