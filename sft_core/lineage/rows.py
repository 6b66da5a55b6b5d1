"""Which rows a model was trained on, and which models a row was trained into.

In: recorded retrainings and the store that their artifacts are in. Out: row_ids, streamed from Parquet files, or None
where the store no longer has the artifact. A row_id is a digest of the conversation's content.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.errors import DataError, RowError
from sft_core.lineage.ancestry import Recorded
from sft_core.normalize import load_map_fn
from sft_core.normalize.conversation import content_digest, to_conversation
from sft_core.store import Store

ROW_ID_DIGITS = 32


@dataclass(frozen=True, slots=True)
class RowUse:
    """What one retraining did with a row: `trained`, `held out`, `absent`, or `unknown` (its artifacts are gone).

    `through`: the version that it is tuned from, and that did so before it; empty if it did so itself.
    """

    use: str
    row_id: str
    through: str = ""


def trained_row_ids(store: Store, pack_fingerprint: str) -> Iterator[str] | None:
    """The row_id of every packed sequence, in order; None if the store has no such artifact."""
    return _row_ids(store, "pack", pack_fingerprint, "sequences")


def conversation_row_ids(store: Store, normalize_fingerprint: str, side: str) -> Iterator[str] | None:
    """The row_ids of one side (`train`, `heldout`) of the conversations; None if the store has no such artifact."""
    return _row_ids(store, "normalize", normalize_fingerprint, side)


def is_row_id(text: str) -> bool:
    """Whether a text is a row_id, not a row."""
    return len(text.strip()) == ROW_ID_DIGITS and set(text.strip()) <= set("0123456789abcdef")


def row_ids_of(recipe: Mapping[str, Any], row: str) -> list[str]:
    """row_ids that a row may have: itself, if it is one, else one for each map_fn that reads it. DataError if none."""
    text = row.strip()
    if is_row_id(text):
        return [text]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{text[:60]!r}: neither a row_id ({ROW_ID_DIGITS} hex digits) nor a JSON row: {error}"
        ) from None
    found: dict[str, None] = {}
    refused = []
    for name in dict.fromkeys(d["map_fn"] for d in (*recipe["datasets"], *recipe["eval_datasets"])):
        try:
            conversation = to_conversation(load_map_fn(name)(value))
        except RowError as error:
            refused.append(f"{name}: {error}")
        except Exception as error:  # noqa: BLE001 - a user's map_fn may raise anything on a row that is not its own
            refused.append(f"{name}: {type(error).__name__}: {error}")
        else:
            found[content_digest(conversation.messages, conversation.tools).hex()[:ROW_ID_DIGITS]] = None
    if not found:
        raise DataError(f"no map_fn of the recipe {recipe['name']} reads this row: {'; '.join(refused)}")
    return list(found)


def use_of_row(recorded: Recorded, store: Store, row_id: str) -> str:
    """What became of a row: a use as of `RowUse`."""
    plan = recorded.plan["steps"]
    trained = trained_row_ids(store, plan["pack"]["fingerprint"])
    if trained is None:
        return "unknown"
    if row_id in trained:
        return "trained"
    held_out = conversation_row_ids(store, plan["normalize"]["fingerprint"], "heldout")
    if held_out is None:
        return "unknown"
    return "held out" if row_id in held_out else "absent"


def _row_ids(store: Store, step: str, fingerprint: str, folder: str) -> Iterator[str] | None:
    if store.find(step, fingerprint) is None:
        return None
    return _read(store.local(store.artifact(step, fingerprint)) / folder)


def _read(folder: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["row_id"]):
                yield from batch.column(0).to_pylist()
