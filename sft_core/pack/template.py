"""A chat template, compiled once, that renders conversation after conversation.

In: a template's text and a tokenizer (for the names of its special tokens). Out: what
`transformers.utils.chat_template_utils.render_jinja_template` gives, at a third of its cost: its compiled template and
its variables, without looking up the special tokens and copying Jinja's globals for every conversation.

Variables of a template (`pack.template_kwargs`) are written into its text, as what holds where nobody says otherwise:
then every reader of the text renders the same without being told, a server that loads the saved tokenizer among them.
"""

import json
import re
import threading
from collections.abc import Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import Context

from sft_core.errors import RecipeError
from sft_core.pack.template_bounds import bound_template, take_blocks, within_time

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
STRFTIME_DATE = "strftime_date"
"""A template variable of this project's: the day that `strftime_now` tells, as `2026-01-31`."""
FIXED_DATE = "2026-01-01"
"""Where the recipe does not name one. Today's would give the same rows other tokens tomorrow."""
DROP_REASONING = "drop_reasoning"
"""Another one: whether rows lose their thoughts before they are rendered (`pack.reasoning: drop`)."""
LAST_ANSWER_ONLY = "last_answer_only"
"""And whether only the last answer of a row is trained (`pack.train_on: last`)."""
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})
"""Variables that are no one's to set."""
Span = tuple[int, int]


class CompiledTemplate:
    """One chat template with one tokenizer's special tokens."""

    def __init__(self, chat_template: str, special_tokens: dict[str, Any]) -> None:
        from transformers.utils import chat_template_utils  # imports torch

        self.marked = GENERATION_MARK.search(chat_template) is not None
        self._template = bound_template(chat_template)
        self._alias_reasoning_fields = chat_template_utils._alias_reasoning_fields
        fixed = {"documents": None, "strftime_now": strftime_fixed}
        self._variables = {**self._template.globals, **special_tokens, **fixed}

    def render(
        self, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
    ) -> tuple[str, list[Span]]:
        """Text of `chat` and the spans of characters that the template marks; with `prompt`, an answer's opening.
        TooCostly beyond the bounds of time and size."""
        with within_time():
            return self._render(chat, tools, prompt)

    def _render(
        self, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
    ) -> tuple[str, list[Span]]:
        variables = {
            **self._variables,
            "messages": self._alias_reasoning_fields(chat),
            "tools": tools,
            "add_generation_prompt": prompt,
        }
        context = self._template.new_context(variables, shared=True)
        blocks: list[str] = []
        marks: list[Span] = []
        if not self.marked:
            take_blocks(self._template.root_render_func(context), blocks)
            return "".join(blocks), marks
        with TRACKING, self._template.environment.activate_tracker(blocks, marks):
            take_blocks(self._template.root_render_func(context), blocks)  # the tracker reads how far the text is
        return "".join(blocks), marks


TRACKING = threading.Lock()
"""Transformers keeps one tracker of generation marks a template, whatever the number of threads."""


@lru_cache(maxsize=32)
def compiled_template(chat_template: str, tokenizer: Any) -> CompiledTemplate:
    """The template with the special tokens that `tokenizer` has now. jinja2.TemplateSyntaxError if it is not Jinja."""
    return CompiledTemplate(chat_template, tokenizer.special_tokens_map)


def bind_template(chat_template: str, variables: Mapping[str, Any]) -> str:
    """The template with these variables as its defaults; one that a caller passes still wins.

    >>> bind_template("{{ a }}", {"a": False})
    "{% if a is not defined %}{% set a = false %}{% endif %}{{ '' }}{{ a }}"

    RecipeError for a name that is no variable's, or one that every rendering sets.
    """
    if not variables:
        return chat_template
    for name in variables:
        if not name.isidentifier() or name in GIVEN or name.endswith("_token"):
            raise RecipeError(f"pack.template_kwargs: {name!r} is not a variable that a recipe can set")
    if STRFTIME_DATE in variables:
        _fixed_date(variables[STRFTIME_DATE])
    defaults = (_default(name, value) for name, value in sorted(variables.items()))
    return "".join(defaults) + "{{ '' }}" + chat_template  # a block at the end would swallow a line break behind it


@pass_context
def strftime_fixed(context: Context, form: str) -> str:
    """In place of transformers' `strftime_now`, which tells the present day."""
    return _fixed_date(context.get(STRFTIME_DATE) or FIXED_DATE).strftime(form)


def drops_reasoning(chat_template: str) -> bool:
    """Whether rows lose their thoughts before this template renders them."""
    return _default(DROP_REASONING, value=True) in chat_template


def trains_the_last(chat_template: str) -> bool:
    """Whether only the last answer of a row is trained."""
    return _default(LAST_ANSWER_ONLY, value=True) in chat_template


def _default(name: str, value: Any) -> str:
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _fixed_date(value: object) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(str(value)), datetime.min.time())
    except ValueError:
        raise RecipeError(
            f"pack.template_kwargs.{STRFTIME_DATE}: {value!r} is not a date such as {FIXED_DATE!r}"
        ) from None


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, default=str)  # a date of YAML
