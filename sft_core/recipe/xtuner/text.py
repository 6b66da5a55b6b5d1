"""A recipe's YAML text from lines, each with a comment that says where it came from.

In: a `Config` that has been read. Out: text; the remarks on what has no counterpart follow as comments.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from sft_core.recipe import Recipe
from sft_core.recipe.xtuner.config import Config, Line

WIDTH = 120


def as_text(config: Config, name: str) -> str:
    """The whole file. Sections stand in the recipe's order."""
    order = {field.alias or key: i for i, (key, field) in enumerate(Recipe.model_fields.items())}
    lines = sorted(config.lines, key=lambda line: order[line.key.partition(".")[0]])
    parts = [
        f"# From XTuner's {config.file.name}, read without running it. Behind each key: where it came from.",
        "# XTuner held no rows out; here eval_fraction of them (0.02) judge the model and are not trained.",
        f"name: {name}",
        *_body(lines),
        *_list("No counterpart", [(f"{r.name} = {r.value}", r.why) for r in config.remarks]),
        *_list("Not followed", [(f"line {s.line}: {s.source}", "only running it would tell") for s in config.skipped]),
    ]
    return "\n".join(parts) + "\n"


def _body(lines: list[Line]) -> Iterator[str]:
    """Block style, a section opened where it first occurs."""
    open_sections: list[str] = []
    for line in lines:
        *sections, key = line.key.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        for depth in range(shared, len(sections)):
            yield f"{'  ' * depth}{sections[depth]}:"
        open_sections = sections
        yield from _entry("  " * len(sections), key, line)


def _entry(indent: str, key: str, line: Line) -> Iterator[str]:
    if isinstance(line.value, list) and any(isinstance(item, dict) for item in line.value):
        yield f"{indent}{key}:  # {line.origin}"
        yield from (f"{indent}  - {_flow(item)}" for item in line.value)
    else:
        yield f"{indent}{key}: {_flow(line.value)}  # {line.origin}"


def _flow(value: Any) -> str:
    """A value on one line, as YAML reads it back."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _list(title: str, entries: list[tuple[str, str]]) -> Iterator[str]:
    if entries:
        yield f"\n# {title}:"
    for what, why in entries:
        yield from textwrap.wrap(f"{what}: {why}", WIDTH, initial_indent="#   ", subsequent_indent="#     ")
