"""Held-out conversations -> what is scored: encoded as in training, with prompt, reference and tags.

In: a Conversations folder, a tokenizer, the chat template. Out: `Example`s and the ledger of rows.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.errors import DataError, RowError
from sft_core.evaluate.report import Identity
from sft_core.fingerprint import hash_text, hash_value
from sft_core.pack import IGNORE_INDEX, Sequence, tools_of
from sft_core.pack.encoding import encode_renderings
from sft_core.pack.rendering import render_conversation
from sft_core.pack.renders import AS_STORED, Form, Tools, in_form, plain_message
from sft_core.pack.template import strftime_fixed
from sft_core.pack.wanted import wanted_of

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out conversation, encoded."""

    row_id: str
    dataset: str
    tags: list[str]
    sequences: list[Sequence]
    messages: Messages
    tools: Tools | None = None
    form: Form = AS_STORED
    typed: bool = False
    """Whether special tokens' strings are typed in it: text here, control tokens at a server that looks no closer."""

    @property
    def encoding(self) -> str:
        """Digest of what is scored: ids and labels."""
        return hash_value([[s.input_ids, s.labels] for s in self.sequences])[:16]

    @property
    def answer_is_trained(self) -> bool:
        """Whether it ends with a text of the assistant that was trained: then an answer can be generated for it."""
        last = self.messages[-1]
        text = last["role"] == "assistant" and last.get("weight") != 0 and not last.get("tool_calls")
        return text and len(self.messages) > 1

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Tool calls of the last message, where these are trained; else none."""
        last = self.messages[-1]
        made = last.get("tool_calls") if last["role"] == "assistant" and last.get("weight") != 0 else None
        return plain_message(last, None)["tool_calls"] if made and len(self.messages) > 1 else []

    @property
    def reference_ids(self) -> list[int]:
        """The last trained turn without the token that ends it."""
        return list(self.sequences[-1].input_ids[self._answer_start : self._last_trained])

    @property
    def prompt(self) -> str:
        """What the users said, for people."""
        return " / ".join(m["content"] or "" for m in self.messages if m["role"] == "user")

    @property
    def reference(self) -> str:
        """The last message."""
        return self.messages[-1]["content"] or ""

    @property
    def prompt_ids(self) -> list[int]:
        """Everything before the last trained turn: the ids of training, so what people typed stays text here too."""
        return list(self.sequences[-1].input_ids[: self._answer_start])

    @property
    def reference_tokens(self) -> int:
        """Tokens of the last trained turn, the one that ends it included."""
        return self._last_trained + 1 - self._answer_start

    @property
    def stop_id(self) -> int:
        """The token that ends the last trained turn."""
        return self.sequences[-1].labels[self._last_trained]

    @property
    def num_bytes(self) -> int:
        """Size of the trained texts as UTF-8, before any template or tokenizer."""
        trained = [m for m in self.messages if m["role"] in ("assistant", "text") and m.get("weight") != 0]
        keys = ("reasoning_content", "content", "tool_calls")
        return sum(len((m.get(key) or "").encode()) for m in trained for key in keys)

    @property
    def _answer_start(self) -> int:
        labels, start = self.sequences[-1].labels, self._last_trained
        while start > 0 and labels[start - 1] != IGNORE_INDEX:
            start -= 1
        return start

    @property
    def _last_trained(self) -> int:
        labels = self.sequences[-1].labels
        return max(i for i, label in enumerate(labels) if label != IGNORE_INDEX)


def read_examples(
    conversations: Path, tokenizer: Any, template: str, max_length: int
) -> tuple[list[Example], dict[str, Any]]:
    """Every held-out conversation that can be scored, and the ledger. DataError if none can."""
    set_aside: Counter[str] = Counter()
    examples = list(scorable_examples(conversations, tokenizer, template, max_length, set_aside))
    rows_in = len(examples) + set_aside.total()
    if not examples:
        raise DataError(
            f"{conversations}: of {rows_in} held-out conversations none can be scored ({dict(set_aside)}); "
            f"raise pack.max_length ({max_length}) or eval_fraction, or see what pack says of the template"
        )
    return examples, {"in": rows_in, "out": len(examples), "set_aside": dict(set_aside)}


def scorable_examples(
    conversations: Path, tokenizer: Any, template: str, max_length: int, set_aside: Counter[str]
) -> Iterator[Example]:
    """Held-out conversations that can be scored, in order; the others are counted in `set_aside`, by reason."""
    for row in held_out_rows(conversations):
        try:
            tools, messages = tools_of(row), wanted_of(row["messages"], template)
            renderings = render_conversation(messages, tokenizer, template, tools)
            sequences = encode_renderings(renderings, tokenizer)
        except RowError as error:
            set_aside[error.reason] += 1
            continue
        if max((len(sequence.input_ids) for sequence in sequences), default=0) > max_length:
            set_aside["overlong"] += 1
        elif all(label == IGNORE_INDEX for sequence in sequences for label in sequence.labels):
            set_aside["nothing_trained"] += 1
        else:
            yield Example(
                row_id=row["row_id"],
                dataset=row["dataset"],
                tags=tags_of(row),
                sequences=sequences,
                messages=messages,
                tools=tools,
                form=renderings[-1].form,
                typed=renderings[-1].typed,
            )


def check_prompt(example: Example, tokenizer: Any, template: str) -> None:
    """The answer is generated behind what a server feeds. DataError if training's ids before it are others."""
    if example.typed:
        return
    served = tokenizer.apply_chat_template(
        in_form([plain_message(message, None) for message in example.messages[:-1]], example.form),
        chat_template=template,
        tools=example.tools,
        add_generation_prompt=True,
        return_dict=True,
        tokenizer_kwargs={"verbose": False},
        strftime_now=strftime_fixed,
    )["input_ids"]
    if served != example.prompt_ids:
        raise DataError(
            f"held-out row {example.row_id}: a server would feed {tokenizer.decode(served)[-60:]!r} before the answer, "
            f"and training has {tokenizer.decode(example.prompt_ids)[-60:]!r}; no score is made of that"
        )


def held_out_rows(conversations: Path) -> Iterator[dict[str, Any]]:
    """Rows of the held-out side, in order."""
    import pyarrow.parquet as pq

    for path in sorted((conversations / "heldout").glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def tags_of(row: dict[str, Any]) -> list[str]:
    """The row's own `tags`, if it has that column, and what its messages are.

    >>> tags_of({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    ['one turn']
    """
    roles = [message["role"] for message in row["messages"]]
    turns = roles.count("assistant")
    found = {
        "system message": "system" in roles,
        "tools": bool(row.get("tools")) or "tool" in roles,
        "plain text": "text" in roles,
        "one turn": turns == 1,
        "several turns": turns > 1,
    }
    return sorted({*(row.get("tags") or ()), *(tag for tag, holds in found.items() if holds)})


def identity_of(tokenizer: Any, template: str) -> Identity:
    """Hashes of the tokenizer's rules and of the template's text."""
    rules = tokenizer.backend_tokenizer
    rules.no_padding()
    rules.no_truncation()
    return Identity(tokenizer=hash_text(rules.to_str()), chat_template=hash_text(template))
