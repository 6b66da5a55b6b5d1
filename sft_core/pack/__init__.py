"""Pack: conversations become token sequences, and sequences share rows.

In: a folder of conversations, a tokenizer, a chat template. Out: `sequences/` (tokens and labels) and `refused/`, shard
by shard, `shards.json`, `bins.parquet` (which sequences share a row in epoch 0), `tokenizer/` (with the template used),
`quarantine/`. Importing this needs no torch; `sft_core.pack.collate` does.
"""

from sft_core.pack.chat_templates import load_chat_template, shipped_templates, template_of
from sft_core.pack.encoding import IGNORE_INDEX, Sequence, encode_conversation, encode_messages
from sft_core.pack.pack import STEP_VERSION, pack_dataset
from sft_core.pack.packed import PackedDataset, load_packed
from sft_core.pack.packing import epoch_bins, pack_lengths
from sft_core.pack.renders import tools_of
from sft_core.pack.stops import stop_token_ids
from sft_core.pack.tokenizer import TokenizerSource

__all__ = [
    "IGNORE_INDEX",
    "STEP_VERSION",
    "PackedDataset",
    "Sequence",
    "TokenizerSource",
    "encode_conversation",
    "encode_messages",
    "epoch_bins",
    "load_chat_template",
    "load_packed",
    "pack_dataset",
    "pack_lengths",
    "shipped_templates",
    "stop_token_ids",
    "template_of",
    "tools_of",
]
