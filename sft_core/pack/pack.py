"""The pack step: conversations to tokenised shards and a bin index.

In: `train/part-*.parquet` (row_id, messages, file, row_number), with `shards.json` where normalize wrote them. Out:
`sequences/part-*.parquet`, `refused/part-*.jsonl` (rows set aside, shard by shard), `shards.json`, `bins.parquet`
(epoch 0), `tokenizer/`, `quarantine/part-00000.jsonl` (the same rows, with their place in the source).

A shard's key is the hash of its conversations, the tokenizer as saved, and what of the recipe decides tokens: packing,
seed and weights do not. Memory holds a few shards, and the lengths of all sequences.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sft_core.artifacts import Outcome
from sft_core.errors import DataError
from sft_core.fingerprint import hash_file, hash_folder, hash_value
from sft_core.pack.chat_templates import template_of
from sft_core.pack.overlap import map_overlapped
from sft_core.pack.packed import BINS, SETTINGS_KEY, TOKENIZER, PackedSettings, read_weights
from sft_core.pack.packing import copies, epoch_rows
from sft_core.pack.proof import PROVED_CONVERSATIONS, prove_rows
from sft_core.pack.shards import COMPRESSION, ORIGIN, REFUSED_FILES, SEQUENCE_FILES, TOKENS, ShardTask, encode_shard
from sft_core.pack.tally import Tally
from sft_core.pack.tokenizer import SavedTokenizer, TokenizerSource, load_saved_tokenizer, load_tokenizer, pad_with_eos
from sft_core.recipe import PackConfig
from sft_core.shard_rows import locate, read_shard
from sft_core.shards import Sharding, ShardJob, ShardWriter, build_shards, read_shard_list

STEP_VERSION = 5
"""Raised when the step's output changes for the same input."""
TRAIN_FILES = "train/*.parquet"
QUARANTINE = "quarantine/part-00000.jsonl"


def pack_dataset(
    conversations: Path,
    tokenizer: Path | str | TokenizerSource,
    config: PackConfig,
    seed: int,
    out: Path,
    sharding: Sharding = Sharding(),  # noqa: B008 - frozen
) -> Outcome:
    """Encode the training side of `conversations` and pack epoch 0. DataError if nothing is left to train on."""
    source = tokenizer if isinstance(tokenizer, TokenizerSource) else TokenizerSource(tokenizer)
    loaded = load_tokenizer(source)
    template = template_of(config, loaded)
    padded_with_eos = loaded.pad_token_id is None
    if padded_with_eos:
        pad_with_eos(loaded, source)
    loaded.chat_template = template
    loaded.save_pretrained(out / TOKENIZER)
    saved = SavedTokenizer(out / TOKENIZER, hash_value(hash_folder(out / TOKENIZER)), source.trust_remote_code)
    jobs = _jobs(conversations, saved, template, config)
    writer = ShardWriter(out, sharding.earlier)
    missing = [job.argument for job in jobs if not writer.holds(job.key)]
    if missing:
        rows, as_saved, all_new = _rows_to_prove(missing), load_saved_tokenizer(saved), len(missing) == len(jobs)
        for line in prove_rows(rows, loaded, as_saved, template, all_new=all_new):
            sharding.on_line(f"note: {line}")
    build_shards(jobs, encode_shard, writer, map_overlapped if sharding.mapper is map else sharding.mapper)
    writer.close()
    _write_quarantine(out, writer)
    tally = Tally.sum(shard.facts for shard in writer.shards)
    if not tally.kept[0]:
        why = tally.reasons() or "no rows came in"
        raise DataError(f"{conversations}: nothing is left to train on: {why}; max_length is {config.max_length}")
    if set_aside := tally.reasons():
        sharding.on_line(f"note: of {tally.entered[0]:,} sequences are set aside: {set_aside}")
    if tally.empty_thoughts:
        sharding.on_line(
            f"note: {tally.empty_thoughts} trained answers have no thought, and the chat template writes an empty one "
            "before them: the model learns not to think. If its prompts can say so (pack.template_kwargs: "
            "{enable_thinking: false}), that is not trained"
        )
    settings = PackedSettings(config.max_length, config.packing, seed, loaded.pad_token_id)
    epoch = _write_bins(out, settings)
    named = {"chat_template": config.chat_template or "the tokenizer's own", "max_length": config.max_length}
    pad = {"pad_token": loaded.pad_token, "pad_token_is_eos": padded_with_eos}
    return Outcome(ledger=tally.ledger(), facts={**_figures(tally), **epoch, **named, **pad})


def _jobs(conversations: Path, saved: SavedTokenizer, template: str, config: PackConfig) -> list[ShardJob]:
    """A job for every shard of the training side."""
    listed = [shard for shard in read_shard_list(conversations) if TRAIN_FILES in shard.files]
    found = [(s.path(conversations, TRAIN_FILES), s.files[TRAIN_FILES].sha256, s.place) for s in listed]
    if not found:  # another tool's: a shard is a file, and its rows name their origin
        paths = sorted((conversations / "train").glob("part-*.parquet"))
        found = [(path, hash_file(path), {}) for path in paths]
    if not found:
        raise DataError(f"{conversations / 'train'}: no part-*.parquet; the normalize step writes them")
    encoding = {
        "max_length": config.max_length,
        "overlong": config.overlong,
        "tokenizer": saved.content,
        "trust_remote_code": saved.trust_remote_code,
        "chat_template": template,
        "tokenizers": version("tokenizers"),
        "version": STEP_VERSION,
    }
    return [
        ShardJob(
            key=hash_value({**encoding, "conversations": sha256}),
            argument=ShardTask(
                path=path,
                place=place,
                tokenizer=saved.path,
                tokenizer_hash=saved.content,
                trust_remote_code=saved.trust_remote_code,
                chat_template=template,
                max_length=config.max_length,
                overlong=config.overlong,
            ),
            place=place,
        )
        for path, sha256, place in found
    ]


def _rows_to_prove(tasks: Sequence[ShardTask]) -> Iterator[dict[str, Any]]:
    """The first rows of shards all over the data, then all rows, in case the chat template refuses those."""
    spread = tasks[:: -(-len(tasks) // PROVED_CONVERSATIONS)]
    each = -(-PROVED_CONVERSATIONS // len(spread))
    yield from chain.from_iterable(islice(read_shard(task.path, task.place), each) for task in spread)
    yield from chain.from_iterable(read_shard(task.path, task.place) for task in tasks)


def _write_quarantine(out: Path, writer: ShardWriter) -> None:
    """The rows that were set aside in any shard, with their place in the source."""
    target = out / QUARANTINE
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for shard in writer.shards:
            if REFUSED_FILES not in shard.files:
                continue
            with shard.path(out, REFUSED_FILES).open(encoding="utf-8", newline="\n") as refused:
                for line in refused:
                    row = locate(json.loads(line), shard.place)
                    origin = {key: row.pop(key) for key in ORIGIN if key in row}
                    file.write(json.dumps({**origin, **row}, ensure_ascii=False) + "\n")


def _write_bins(out: Path, settings: PackedSettings) -> dict[str, Any]:
    """Write epoch 0's bins with the settings beside them; figures of that epoch."""
    shards = sorted(out.glob(SEQUENCE_FILES))
    lengths = np.concatenate([_lengths(shard) for shard in shards])
    weights, limit = read_weights(out), settings.max_length
    rows = epoch_rows(lengths, limit, settings.packing, settings.seed, 0, weights)
    cuts = {} if rows.first is None else {"first": rows.first, "last": rows.last}
    columns = {"bin": rows.members} | cuts
    offsets = pa.array(rows.offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())) for values in columns.values()]
    metadata = {SETTINGS_KEY: json.dumps(asdict(settings))}
    schema = pa.schema([(name, TOKENS) for name in columns], metadata=metadata)
    pq.write_table(pa.table(lists, schema=schema), out / BINS, compression=COMPRESSION)
    numbers = copies(weights, settings.seed, epoch=0)
    tokens = int(np.dot(numbers, lengths.astype(np.int64)))
    packed_rows = len(rows.offsets) - 1
    return {
        "epoch_sequences": int(numbers.sum()),
        "epoch_tokens": tokens,
        "packed_rows": packed_rows,
        "fill": round(tokens / (packed_rows * limit), 6),
        "longest": int(lengths.max()),
    }


def _lengths(shard: Path) -> NDArray[np.int32]:
    with pq.ParquetFile(shard) as file:  # `read_table` takes four times as long, mostly to set out
        lengths: NDArray[np.int32] = file.read(["length"], use_threads=False)["length"].to_numpy()
        return lengths


def _figures(tally: Tally) -> dict[str, int]:
    sequences, tokens, supervised, _ = tally.kept
    return {
        "sequences": sequences,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "split_sequences": tally.split,
        "special_token_text_rows": tally.typed_rows,
        "parted_turns": tally.parted_turns,
        "dropped_thoughts": tally.dropped_thoughts,
        "empty_thoughts": tally.empty_thoughts,
    }
