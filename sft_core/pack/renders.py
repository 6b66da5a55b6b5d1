"""What a template makes of a conversation's first messages, each rendering made once; and in which form they are given.

In: messages as the store has them, a tokenizer (for the names of its special tokens), a chat template. Out: texts.
RowError where the template refuses the messages, RecipeError where it is not Jinja.
"""

import json
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import product
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sft_core.errors import RecipeError, RowError, SftError
from sft_core.pack.controls import Controls
from sft_core.pack.template import Span, compiled_template
from sft_core.pack.template_bounds import TooCostly
from sft_core.pack.thoughts import thinks_inline, without_thought

Tools = SequenceOf[dict[str, Any]]
KEYS = frozenset({"content", "tool_calls", "name", "tool_call_id", "reasoning_content"})
"""What a message can hold beside `role` and `weight`."""
REASONING_ALIASES = ("reasoning", "thinking")
"""Older names of `reasoning_content`."""
SMALL_CHARACTERS = 100_000
NEXT = "next"
"""A user's message that shows how a rendering goes on."""


@dataclass(frozen=True, slots=True)
class Form:
    """How messages are handed to the template, where it wants them otherwise than stored."""

    parts: bool = False
    """Contents as a list of one text part: templates of models that see do not read plain texts."""
    no_content: bool = False
    """Null for an empty content beside tool calls."""
    thought_apart: bool = False
    """`<think>...</think>` at a content's start as `reasoning_content`."""
    arguments_as_text: bool = False
    """Arguments of tool calls as JSON text."""


AS_STORED = Form()


def forms_of(chat: SequenceOf[dict[str, Any]]) -> Iterator[Form]:
    """As stored, then the others that would change something."""
    calls = [message for message in chat if message.get("tool_calls")]
    options = {
        "parts": True,
        "no_content": any(not message["content"] for message in calls),
        "thought_apart": any(thinks_inline(message) for message in chat),
        "arguments_as_text": bool(calls),
    }
    for chosen in product(*((False, True) if possible else (False,) for possible in options.values())):
        yield Form(*chosen)


def in_form(chat: SequenceOf[dict[str, Any]], form: Form) -> list[dict[str, Any]]:
    """The messages (`plain_message`) as the template gets them."""
    return [_message_in(message, form) for message in chat] if form != AS_STORED else list(chat)


def _message_in(message: dict[str, Any], form: Form) -> dict[str, Any]:
    content, changed = message["content"], dict[str, Any]()
    if form.thought_apart and thinks_inline(message):
        thought, content = without_thought(content) or ("", content)
        changed["reasoning_content"], content = thought.strip(), content.lstrip("\n")
    if form.arguments_as_text and message.get("tool_calls"):
        changed["tool_calls"] = [_arguments_as_text(call) for call in message["tool_calls"]]
    if form.no_content and message.get("tool_calls") and not content:
        return {**message, **changed, "content": None}
    return {**message, **changed, "content": [{"type": "text", "text": content}] if form.parts else content}


def _arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    text = function.get("arguments")
    written = {**function, "arguments": text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


class Renders:
    """Renderings of a conversation's first messages, each made once."""

    def __init__(self, chat: list[dict[str, Any]], tokenizer: Any, chat_template: str, tools: Tools | None) -> None:
        self.chat = chat
        self.tools = list(tools) if tools else None
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._made: dict[tuple[int, bool], tuple[str, list[Span]]] = {}

    @property
    def marked(self) -> bool:
        """Whether the template has generation marks."""
        return compiled_template(self.chat_template, self.tokenizer).marked

    def upto(self, count: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """Text of `messages[:count]` and what the template marks in it; with `prompt`, the opening of an answer."""
        if (count, prompt) not in self._made:
            self._made[count, prompt] = self._render(self.chat[:count], prompt) if count or prompt else ("", [])
        return self._made[count, prompt]

    def continued(self, count: int) -> str:
        """Text of `messages[:count]` and a user's next one."""
        parted = any(isinstance(message["content"], list) for message in self.chat)
        content = [{"type": "text", "text": NEXT}] if parted else NEXT
        return self._render([*self.chat[:count], {"role": "user", "content": content}], prompt=False)[0]

    def _render(self, chat: list[dict[str, Any]], prompt: bool) -> tuple[str, list[Span]]:
        try:
            compiled = compiled_template(self.chat_template, self.tokenizer)
        except TemplateSyntaxError as error:
            raise RecipeError(f"pack.chat_template, line {error.lineno}: not Jinja: {error.message}") from None
        except (TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise RecipeError(f"pack.chat_template: cannot be compiled: {type(error).__name__}: {error}") from None
        try:
            return compiled.render(chat, self.tools, prompt)
        except SftError:
            raise
        except TooCostly as error:
            if _is_small(chat, self.tools):
                raise RecipeError(
                    f"pack.chat_template: {error} for a conversation of {len(chat)} short messages"
                ) from None
            raise RowError("template_cost", f"the chat template is too costly for it: {error}") from None
        except Exception as error:  # noqa: BLE001 - a template may do anything with a row
            first = f"the first {len(chat)} messages" if chat else "a conversation that begins with an answer"
            raise RowError("template_error", f"the chat template refuses {first}: {error}") from None


def _is_small(chat: list[dict[str, Any]], tools: Tools | None) -> bool:
    """Whether a rendering of it should be quick: then the template is at fault, and not the row."""
    return len(repr((chat, tools))) < SMALL_CHARACTERS


def plain_message(message: dict[str, Any], controls: Controls | None) -> dict[str, Any]:
    """The message as the template sees it: no weight, no empty keys, tool calls as a list, text parts as one
    text, special tokens' strings cloaked. RowError for what nobody would see in a rendering."""
    kept = {key: value for key, value in message.items() if value is not None and key not in ("role", "weight")}
    for alias in REASONING_ALIASES:
        if alias in kept:
            kept.setdefault("reasoning_content", kept.pop(alias))
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(map(_text_of_part, kept["content"]))
    for key in kept.keys() - KEYS:
        raise RowError("unknown_key", f"a message's {key!r} would not be rendered; known are {', '.join(sorted(KEYS))}")
    if "tool_calls" in kept:
        kept["tool_calls"] = _dicts_in(kept["tool_calls"], "tool_calls")
    cloaked = cloak_values(kept, controls) if controls else kept
    return {"role": message["role"], "content": "", **cloaked}


def _text_of_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RowError("content_part", f"a content part that is no text cannot be rendered: {str(part)[:80]!r}")
    text: str = part["text"]
    return text


def tools_of(row: dict[str, Any]) -> Tools | None:
    """The tools of a stored row: its column `tools`, JSON text or null. RowError if it holds something else."""
    return _dicts_in(row["tools"], "tools") if row.get("tools") else None


def _dicts_in(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of mappings, or the JSON text of one."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError("tools", f"{where} is not JSON: {error}") from None
    if not isinstance(parsed, list) or not all(isinstance(entry, dict) for entry in parsed):
        raise RowError("tools", f"{where} is not a list of objects: {str(value)[:80]!r}")
    return parsed


def cloak_values(value: Any, controls: Controls) -> Any:
    """`value` with special tokens' strings cloaked, keys of mappings included: a tool's argument may be called so."""
    if isinstance(value, dict):
        return {controls.cloak(key): cloak_values(part, controls) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [cloak_values(part, controls) for part in value]
    return controls.cloak(value)
