"""The pack step: conversations to tokenised shards and a bin index.

In: `train/part-*.parquet` (row_id, messages, dataset, file, row_number). Out: `sequences/part-*.parquet`,
`bins.parquet` (epoch 0), `tokenizer/`, `quarantine/part-00000.jsonl`. Shards stream: memory holds one batch of rows,
and the lengths of all sequences.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.artifacts import Outcome
from sft_core.errors import DataError, ModelError
from sft_core.pack.chat_templates import load_chat_template
from sft_core.pack.packed import BINS, SEQUENCES, SETTINGS_KEY, TOKENIZER, PackedSettings
from sft_core.pack.packing import Lengths, epoch_rows
from sft_core.pack.shards import COMPRESSION, TOKENS, Packing, encode_shard
from sft_core.recipe import PackConfig


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
        packing = Packing(loaded, saved, template, config, quarantine)
        for shard in shards:
            encode_shard(packing, shard, out / SEQUENCES / shard.name)
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
        "split_sequences": tally.split,
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


def _write_bins(lengths: Lengths, settings: PackedSettings, path: Path) -> int:
    """Write epoch 0's bins with the settings beside them; how many there are."""
    rows = epoch_rows(lengths, settings.max_length, settings.packing, settings.seed, epoch=0)
    cuts = {} if rows.first is None else {"first": rows.first, "last": rows.last}
    columns = {"bin": rows.members} | cuts
    offsets = pa.array(rows.offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())) for values in columns.values()]
    metadata = {SETTINGS_KEY: json.dumps(asdict(settings))}
    schema = pa.schema([(name, TOKENS) for name in columns], metadata=metadata)
    pq.write_table(pa.table(lists, schema=schema), path, compression=COMPRESSION)
    return len(rows.offsets) - 1
