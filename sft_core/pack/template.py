"""A chat template, compiled once, that renders conversation after conversation.

In: a template's text and a tokenizer (for the names of its special tokens). Out: what
`transformers.utils.chat_template_utils.render_jinja_template` gives, at a third of its cost: its compiled template and
its variables, without looking up the special tokens and copying Jinja's globals for every conversation.
"""

import re
import threading
from functools import lru_cache
from typing import Any

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class CompiledTemplate:
    """One chat template with one tokenizer's special tokens."""

    def __init__(self, chat_template: str, special_tokens: dict[str, Any]) -> None:
        from transformers.utils import chat_template_utils  # imports torch

        self.marked = GENERATION_MARK.search(chat_template) is not None
        self._template = chat_template_utils._compile_jinja_template(chat_template)
        self._alias_reasoning_fields = chat_template_utils._alias_reasoning_fields
        self._variables = {**self._template.globals, **special_tokens, "documents": None}

    def render(
        self, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
    ) -> tuple[str, list[Span]]:
        """Text of `chat` and the spans of characters that the template marks; with `prompt`, an answer's opening."""
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
            return "".join(self._template.root_render_func(context)), marks
        with TRACKING, self._template.environment.activate_tracker(blocks, marks):
            for block in self._template.root_render_func(context):
                blocks.append(block)  # noqa: PERF402 - the tracker reads how far the text is
        return "".join(blocks), marks


TRACKING = threading.Lock()
"""Transformers keeps one tracker of generation marks a template, whatever the number of threads."""


@lru_cache(maxsize=32)
def compiled_template(chat_template: str, tokenizer: Any) -> CompiledTemplate:
    """The template with the special tokens that `tokenizer` has now. jinja2.TemplateSyntaxError if it is not Jinja."""
    return CompiledTemplate(chat_template, tokenizer.special_tokens_map)
