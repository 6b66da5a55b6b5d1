"""The pack step: conversations to tokenised shards and a bin index.

In: `train/part-*.parquet` (row_id, messages, dataset, file, row_number). Out: `sequences/part-*.parquet`,
`bins.parquet` (epoch 0), `tokenizer/`, `quarantine/part-00000.jsonl`. Shards stream: memory holds one batch of rows,
and the lengths of all sequences.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.artifacts import Outcome
from sft_core.errors import DataError, ModelError, RowError
from sft_core.pack.chat_templates import load_chat_template
from sft_core.pack.encoding import IGNORE_INDEX, Sequence, encode_renderings
from sft_core.pack.packed import BINS, SEQUENCES, SETTINGS_KEY, TOKENIZER, PackedSettings
from sft_core.pack.packing import epoch_bins
from sft_core.pack.proof import PROVED_CONVERSATIONS, prove_row
from sft_core.pack.rendering import Rendering, render_conversation
from sft_core.pack.tally import Tally
from sft_core.recipe import PackConfig

BATCH_ROWS = 1000
COMPRESSION = "zstd"
TOKENS = pa.list_(pa.int32())
SEQUENCE_SCHEMA = pa.schema([("row_id", pa.string()), ("input_ids", TOKENS), ("labels", TOKENS)])


@dataclass(frozen=True, slots=True)
class _Packing:
    """One run of the step: what rows are encoded with, and where the books and the quarantine are."""

    tokenizer: Any
    saved: Any
    template: str
    config: PackConfig
    quarantine: IO[str]
    tally: Tally = field(default_factory=Tally)


def pack_dataset(
    conversations: Path,
    tokenizer: Path | str,
    config: PackConfig,
    seed: int,
    out: Path,
    trust_remote_code: bool = False,
) -> Outcome:
    """Encode the training side of `conversations` and pack epoch 0. DataError if nothing is left to train on."""
    loaded = _load_tokenizer(tokenizer, trust_remote_code)
    template = load_chat_template(config.chat_template, loaded)
    padded_with_eos = loaded.pad_token_id is None
    if padded_with_eos:
        _pad_with_eos(loaded, tokenizer)
    loaded.chat_template = template
    loaded.save_pretrained(out / TOKENIZER)
    saved = _load_tokenizer(out / TOKENIZER, trust_remote_code)
    shards = sorted((conversations / "train").glob("part-*.parquet"))
    if not shards:
        raise DataError(f"{conversations / 'train'}: no part-*.parquet; the normalize step writes them")
    for folder in (SEQUENCES, "quarantine"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with (out / "quarantine" / "part-00000.jsonl").open("w", encoding="utf-8") as quarantine:
        packing = _Packing(loaded, saved, template, config, quarantine)
        for shard in shards:
            _encode_shard(packing, shard, out / SEQUENCES / shard.name)
    tally = packing.tally
    if not tally.lengths:
        raise DataError(
            f"{conversations}: nothing is left to train on: {tally.reasons()}; max_length is {config.max_length}"
        )
    settings = PackedSettings(config.max_length, config.packing, seed, loaded.pad_token_id)
    rows = _write_bins(tally.lengths, settings, out / BINS)
    facts = {
        "sequences": len(tally.lengths),
        "tokens": sum(tally.lengths),
        "supervised_tokens": tally.supervised,
        "packed_rows": rows,
        "fill": round(sum(tally.lengths) / (rows * config.max_length), 6),
        "longest": max(tally.lengths),
        "special_token_text_rows": tally.typed_rows,
        "chat_template": config.chat_template or "the tokenizer's own",
        "max_length": config.max_length,
        "pad_token": loaded.pad_token,
        "pad_token_is_eos": padded_with_eos,
    }
    return Outcome(ledger=tally.ledger(), facts=facts)


def _load_tokenizer(folder: Path | str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # imports torch

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer can be loaded: {str(error).splitlines()[0]}") from None


def _pad_with_eos(tokenizer: Any, folder: Path | str) -> None:
    """Fill rows with eos where there is no pad token: padding is untrained and apart, so any token of the vocabulary
    serves, and the vocabulary is never resized."""
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{folder}: the tokenizer has neither a pad nor an eos token; set one in tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _encode_shard(packing: _Packing, shard: Path, target: Path) -> None:
    file = pq.ParquetFile(shard)
    with pq.ParquetWriter(target, SEQUENCE_SCHEMA, compression=COMPRESSION) as writer:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            kept = list(_encode_rows(packing, batch.to_pylist()))
            ids, tokens, labels = zip(*kept, strict=True) if kept else ((), (), ())
            columns = [pa.array(ids, pa.string()), pa.array(tokens, TOKENS), pa.array(labels, TOKENS)]
            writer.write_batch(pa.record_batch(columns, schema=SEQUENCE_SCHEMA))


def _encode_rows(packing: _Packing, rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[int], list[int]]]:
    rendered = [(row, renderings) for row in rows if (renderings := _render(packing, row))]
    sequences = iter(encode_renderings([r for _, renderings in rendered for r in renderings], packing.tokenizer))
    for row, renderings in rendered:
        of_row = [next(sequences) for _ in renderings]
        if packing.tally.proved < PROVED_CONVERSATIONS:
            prove_row(row, renderings, of_row, packing.saved)
            packing.tally.proved += 1
        packing.tally.typed_rows += renderings[0].typed
        for sequence in of_row:
            if kept := _admit(packing, row, sequence):
                packing.tally.keep(len(kept.input_ids), _supervised(kept.labels))
                yield row["row_id"], kept.input_ids, kept.labels


def _render(packing: _Packing, row: dict[str, Any]) -> list[Rendering]:
    """Renderings of one row; none, and the row in quarantine, if the chat template has no place for it."""
    try:
        return render_conversation(row["messages"], packing.tokenizer, packing.template)
    except RowError as error:
        packing.tally.enter((1, 0, 0))
        _set_aside(packing, row, error.reason, (1, 0, 0), error.detail)
        return []


def _admit(packing: _Packing, row: dict[str, Any], sequence: Sequence) -> Sequence | None:
    """The sequence as it will be trained, shortened if the recipe says so; None once it is in quarantine."""
    length, supervised = len(sequence.input_ids), _supervised(sequence.labels)
    limit, overlong = packing.config.max_length, packing.config.overlong
    packing.tally.enter((1, length, supervised))
    kept = sequence
    if length > limit:
        if overlong == "error":
            raise DataError(
                f"{row['dataset']}, {row['file']}, row {row['row_number']}: {length} tokens, pack.max_length "
                f"is {limit}; raise it, or set pack.overlong to quarantine or truncate"
            )
        if overlong == "quarantine":
            _set_aside(packing, row, "overlong", (1, length, supervised))
            return None
        kept = Sequence(sequence.input_ids[:limit], sequence.labels[:limit])
    left = _supervised(kept.labels)
    if not left:
        _set_aside(packing, row, "no_supervised_token", (1, length, supervised))
        return None
    if kept is not sequence:
        packing.tally.drop("truncated", (0, length - limit, supervised - left))
    return kept


def _set_aside(
    packing: _Packing, row: dict[str, Any], reason: str, counts: tuple[int, int, int], detail: str = ""
) -> None:
    packing.tally.drop(reason, counts)
    entry = {key: row[key] for key in ("row_id", "dataset", "file", "row_number")}
    entry |= {"reason": reason, "tokens": counts[1]} | ({"detail": detail} if detail else {})
    packing.quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _supervised(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)


def _write_bins(lengths: list[int], settings: PackedSettings, path: Path) -> int:
    """Write epoch 0's bins with the settings beside them; how many there are."""
    bins = epoch_bins(lengths, settings.max_length, settings.packing, settings.seed, epoch=0)
    schema = pa.schema([("bin", TOKENS)], metadata={SETTINGS_KEY: json.dumps(asdict(settings))})
    pq.write_table(pa.table([pa.array(bins, TOKENS)], schema=schema), path, compression=COMPRESSION)
    return len(bins)
