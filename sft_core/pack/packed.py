"""Read what the pack step wrote.

In: a packed folder. Out: `PackedDataset`: lengths, sequences by number, and the settings that epochs are packed by.
"""

import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sft_core.errors import StoreError
from sft_core.pack.encoding import Sequence
from sft_core.pack.packing import Piece, epoch_bins
from sft_core.shards import read_shard_list

BINS = "bins.parquet"
SEQUENCES = "sequences"
TOKENIZER = "tokenizer"
SETTINGS_KEY = b"sft_flows"


@dataclass(frozen=True, slots=True)
class PackedSettings:
    """What epochs are packed by, and the token that fills rows. Kept in the metadata of `bins.parquet`."""

    max_length: int
    packing: str
    seed: int
    pad_token_id: int


@dataclass(frozen=True, slots=True)
class PackedDataset:
    """Sequences in the order of the shards. `lengths` in tokens; `tokenizer` is a folder."""

    lengths: NDArray[np.int64]
    tokenizer: Path
    settings: PackedSettings
    table: Any
    """pyarrow.Table with the columns row_id, input_ids, labels, length."""
    chunk_starts: tuple[int, ...]
    """Number of the first sequence of each of the table's chunks."""
    weights: NDArray[np.float64]
    """Of each sequence's data set: how often it stands in an epoch, on average."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens a packed row holds at most."""
        return self.settings.max_length

    @property
    def packing(self) -> str:
        """`best_fit`, `concat` or `none`."""
        return self.settings.packing

    @property
    def pad_token_id(self) -> int:
        """Fills the end of a row; never trained."""
        return self.settings.pad_token_id

    def sequence(self, index: int | Piece) -> Sequence:
        """Sequence number `index`, or a piece of one with its labels as they are."""
        if isinstance(index, Piece):
            whole = self.sequence(index.number)
            return Sequence(whole.input_ids[index.first : index.last], whole.labels[index.first : index.last])
        return Sequence(self._list("input_ids", index), self._list("labels", index))

    def row_id(self, index: int) -> str:
        """The conversation that sequence `index` comes from."""
        return str(self.table.column("row_id")[index].as_py())

    def bins(self, epoch: int) -> list[list[Any]]:
        """What `sequence` takes, packed row by packed row, of an epoch: numbers, and with `concat` also `Piece`s."""
        settings = self.settings
        return epoch_bins(
            self.lengths, settings.max_length, settings.packing, settings.seed, epoch, weights=self.weights
        )

    def _list(self, column: str, index: int) -> list[int]:
        chunk = bisect_right(self.chunk_starts, index) - 1
        entry = self.table.column(column).chunk(chunk)[index - self.chunk_starts[chunk]]
        values: list[int] = entry.values.to_numpy().tolist()
        return values


def load_packed(packed: Path, cache: Path | None = None) -> PackedDataset:
    """Open a packed folder. Tokens are held in memory (8 bytes each), or mapped from the Arrow file `cache`, made if
    it is not there: ranks of one machine that name the same file share it. StoreError if the folder is torn."""
    shards = sorted((packed / SEQUENCES).glob("part-*.parquet"))
    if not shards or not (packed / BINS).is_file():
        raise StoreError(
            f"{packed}: not a packed folder ({SEQUENCES}/part-*.parquet and {BINS}); run the pack step again"
        )
    metadata = pq.read_schema(packed / BINS).metadata or {}
    settings = PackedSettings(**json.loads(metadata[SETTINGS_KEY]))
    table = _map_table(shards, cache) if cache else pa.concat_tables([pq.read_table(shard) for shard in shards])
    lengths = table.column("length").to_numpy().astype(np.int64)
    starts = tuple(np.cumsum([0, *map(len, table.column("input_ids").chunks)]).tolist())[:-1]
    return PackedDataset(lengths, packed / TOKENIZER, settings, table, starts, read_weights(packed))


def read_weights(packed: Path) -> NDArray[np.float64]:
    """Weight of each sequence: that of its shard's data set."""
    places = {shard.name: shard.place for shard in read_shard_list(packed)}
    shards = sorted((packed / SEQUENCES).glob("part-*.parquet"))
    weights = [places.get(shard.stem, {}).get("weight", 1.0) for shard in shards]
    return np.repeat(np.array(weights, np.float64), [pq.read_metadata(shard).num_rows for shard in shards])


def _map_table(shards: list[Path], cache: Path) -> Any:
    if not cache.is_file():
        unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
        schema = pq.read_schema(shards[0]).remove_metadata()
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for shard in shards:
                for batch in pq.ParquetFile(shard).iter_batches():
                    writer.write_batch(batch.replace_schema_metadata(None))
        unfinished.replace(cache)
    return pa.ipc.open_file(pa.memory_map(str(cache))).read_all()
