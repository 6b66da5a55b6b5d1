"""One fetched row: what conversation it becomes, and whose side that is on.

In: a row as fetch wrote it, and a map_fn. Out: a `Conversation`, or a RowError that says why there is none; sides and
sampling by the conversation's content alone.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from sft_core.errors import DataError, RowError
from sft_core.normalize.columns import ADDRESS, short
from sft_core.normalize.conversation import Conversation, to_conversation
from sft_core.normalize.reads import check_columns

MapFn = Callable[[dict[str, Any]], object]


def read_conversation(record: Mapping[str, Any], map_fn: MapFn) -> Conversation:
    """The conversation of one fetched row. RowError when it cannot become one."""
    return convert_row(read_row(record), map_fn)


def convert_row(row: dict[str, Any], map_fn: MapFn) -> Conversation:
    """The conversation that a map_fn makes of a row; a shipped one must have read all that belongs to it."""
    try:
        returned = map_fn(row)
    except RowError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's map_fn may raise anything; the row is kept
        raise RowError("map_fn_error", ADDRESS.sub("", f"{type(error).__name__}: {error}")) from error
    if returned is None:
        raise RowError("left_out", "the map_fn returned None")
    conversation = to_conversation(returned)
    check_columns(row, map_fn)
    return conversation


def prove_repeatable(record: Mapping[str, Any], map_fn: MapFn, name: str) -> None:
    """DataError unless the map_fn makes the same of a row when it is called again. One that draws at random would move
    rows from side to side, and the same recipe would not give the same bytes."""
    if _outcome(record, map_fn) != _outcome(record, map_fn):
        raise DataError(
            f"map_fn {name!r} returns something else when it is called again with the same row, "
            f"{short(record['row'])}; it may depend on the row alone: draw with random.Random(a text of the row), and "
            "leave out times and counters"
        )


def _outcome(record: Mapping[str, Any], map_fn: MapFn) -> Conversation | tuple[str, str]:
    try:
        return read_conversation(record, map_fn)
    except RowError as error:
        return error.reason, error.detail


def read_row(record: Mapping[str, Any]) -> dict[str, Any]:
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
