"""The normalize step itself.

In: folders that fetch wrote, each with its map_fn. Out: `train/`, `heldout/`, `quarantine/` below `out`. Rows stream;
what stays in memory is a 32-byte digest a distinct conversation.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from sft_core.artifacts import Outcome
from sft_core.errors import RowError
from sft_core.fetch import ShardWriter, read_shards
from sft_core.normalize.conversation import Conversation, Message, content_digest, to_conversation
from sft_core.normalize.limits import check_limits
from sft_core.normalize.load import load_map_fn
from sft_core.normalize.tally import Example, Tally
from sft_core.recipe import NormalizeConfig

STEP_VERSION = 2
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("weight", pa.int8()),
        ("tool_calls", pa.string()),  # JSON text, here and in `tools`
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
    ]
)
CONVERSATION_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("tools", pa.string()),
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("row_number", pa.int64()),
    ]
)
MapFn = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizeSource:
    """A fetched data set: `rows` is fetch's folder, `name` what reports call it; `held_out`: for evaluation only."""

    rows: Path
    map_fn: str
    name: str
    weight: float = 1.0
    held_out: bool = False


def normalize_dataset(
    sources: Sequence[NormalizeSource], config: NormalizeConfig, eval_fraction: float, seed: int, out: Path
) -> Outcome:
    """Write both sides and the quarantine. DataError over the limit, or when a side is empty."""
    tally = sort_rows(sources, eval_fraction, seed, out)
    check_limits(tally, config.max_quarantined_fraction, {source.name: source.map_fn for source in sources})
    return Outcome(ledger=tally.ledger(), facts=tally.facts())


def sort_rows(sources: Sequence[NormalizeSource], eval_fraction: float, seed: int, out: Path) -> Tally:
    """Write both sides and the quarantine, whatever they hold."""
    loaded = [(source, load_map_fn(source.map_fn)) for source in sources]  # before any work: a wrong name fails at once
    quarantine = out / "quarantine" / "part-00000.jsonl"
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    with quarantine.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        sorter = _Sorter(out, file, eval_fraction, seed)
        for source, map_fn in sorted(loaded, key=lambda pair: pair[0].held_out):  # training first: it decides overlaps
            for record in read_shards(source.rows / "rows"):
                sorter.take(source, map_fn, record)
        sorter.close()
    return sorter.tally


def read_conversation(record: dict[str, Any], map_fn: MapFn) -> Conversation:
    """The conversation of one fetched row. RowError when it cannot become one."""
    row = read_row(record)
    try:
        returned = map_fn(row)
    except RowError:
        raise
    except Exception as error:  # noqa: BLE001 - a user's map_fn may raise anything; the row is kept with what it raised
        raise RowError("map_fn_error", f"{type(error).__name__}: {error}") from error
    return to_conversation(returned)


def read_row(record: dict[str, Any]) -> dict[str, Any]:
    """The mapping of columns that a fetched row is; a bare list of messages becomes the column messages."""
    if record["problem"] is not None:
        reason, _, detail = record["problem"].partition(": ")
        raise RowError(reason, detail)
    try:
        row = json.loads(record["row"])
    except (ValueError, RecursionError) as error:
        raise RowError("not_json", str(error)) from None
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"the row is a {type(row).__name__}, not a mapping of columns")
    return row


def is_held_out(digest: bytes, eval_fraction: float) -> bool:
    """Whether a conversation falls to the held-out side: by its content alone, so on every night and with any seed."""
    return _share(digest) < eval_fraction


def is_sampled(digest: bytes, weight: float, seed: int) -> bool:
    """Whether a data set's weight keeps a conversation. Independent of its side."""
    return weight >= 1 or _share(hashlib.sha256(f"{seed}:".encode() + digest).digest()) < weight


def _share(digest: bytes) -> float:
    """A number from 0 up to 1, evenly spread."""
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def _length(message: Message) -> int:
    return len(message["content"]) + len(message.get("tool_calls") or "")


class _Sorter:
    """Sends each row to its place and counts it."""

    def __init__(self, out: Path, quarantine: IO[str], eval_fraction: float, seed: int) -> None:
        self.tally = Tally()
        self._sides = {side: ShardWriter(out / side, CONVERSATION_SCHEMA) for side in ("train", "heldout")}
        self._quarantine = quarantine
        self._eval_fraction, self._seed = eval_fraction, seed
        self._seen: Counter[bytes] = Counter()
        self._trained: set[bytes] = set()

    def take(self, source: NormalizeSource, map_fn: MapFn, record: dict[str, Any]) -> None:
        """One fetched row."""
        self.tally.come(source.name)
        try:
            conversation = read_conversation(record, map_fn)
        except RowError as error:
            self._set_aside(source, record, error, ())
            return
        messages = conversation.messages
        self.tally.become(messages)
        digest = content_digest(messages, conversation.tools)
        if not is_sampled(digest, source.weight, self._seed):
            self._set_aside(source, record, RowError("not_sampled", f"weight {source.weight}"), messages)
        elif source.held_out and digest in self._trained:
            self._set_aside(source, record, RowError("also_in_training", "training has this conversation"), messages)
        else:
            held_out = source.held_out or is_held_out(digest, self._eval_fraction)
            self._keep(source, record, "heldout" if held_out else "train", digest, conversation)

    def close(self) -> None:
        """Write what is left."""
        for writer in self._sides.values():
            writer.close()

    def _keep(
        self, source: NormalizeSource, record: dict[str, Any], side: str, digest: bytes, conversation: Conversation
    ) -> None:
        occurrence = self._seen[digest]
        self._seen[digest] += 1
        if side == "train":
            self._trained.add(digest)
        row = {
            "row_id": hashlib.sha256(digest + str(occurrence).encode()).hexdigest()[:32],
            "messages": conversation.messages,
            "tools": conversation.tools,
            "dataset": source.name,
            "file": record["file"],
            "row_number": record["row_number"],
        }
        self._sides[side].add(row, len(conversation.tools or "") + sum(map(_length, conversation.messages)))
        self.tally.keep(source.name, side, conversation.messages)

    def _set_aside(
        self, source: NormalizeSource, record: dict[str, Any], error: RowError, messages: Sequence[Message]
    ) -> None:
        place = {"dataset": source.name, "file": record["file"], "row_number": record["row_number"]}
        self.tally.set_aside(error.reason, Example(**place, detail=error.detail, row=record["row"]), messages)
        if error.reason != "not_sampled":
            line = {**place, "reason": error.reason, "detail": error.detail, "row": record["row"]}
            self._quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
