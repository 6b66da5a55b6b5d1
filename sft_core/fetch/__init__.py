"""Step 1, fetch: a source (hub id, file, glob, folder, fsspec URL) becomes `RawDataset`, rows unchanged.

A folder is read in the order of its files' names; one that `save_to_disk` wrote is the Arrow files it lists. openMind
and ModelScope are read by their own packages (`source: openmind`), and known by the hash of their rows.

In: a `DatasetConfig`, and where shards may be taken from. Out: `shards.json` and `rows/part-00000.parquet` ... with the
columns of `RAW_SCHEMA`, which `read_shards` yields as dicts (a shard holds the file's place in a list and a relative
number, see `place` in `sft_core.shards`):

row         the raw row as JSON text, exactly as read (JSON Lines, JSON); rows of CSV, Parquet, Arrow and the hub are
            written as JSON text, keys in column order, dates as ISO text, decimals and durations as text, bytes
            (an image column's too, never decoded) as base64, maps as objects; null keys that Arrow filled into structs
            of tool calls and tools are left out (`arrow_values`)
file        the file's name as a human knows it: its base name, or its path below the folder or glob
row_number  from 1: the line of the file (JSON Lines, CSV: where the row begins), else the place among the rows
problem     null, or `reason: detail` of a line that could not be read; `row` then holds its text, bad bytes escaped:
            not_utf8, not_json, bad_csv_row, too_large; not_text for a table's value that neither Python nor
            JSON can hold

Blank lines are not rows. A file that is broken as a whole (a JSON array with a trailing comma, a CSV that is not UTF-8)
is a SourceError; a broken line of JSON Lines is kept, with its problem, for normalize to set aside.
"""

from sft_core.fetch.dataset import STEP_VERSION, fetch_dataset
from sft_core.fetch.other_hubs import OtherHubSource
from sft_core.fetch.raw_shards import RAW_SCHEMA
from sft_core.fetch.source import HubSource, SourceDescription, SourceFile, describe_source
from sft_core.shard_rows import read_shards

__all__ = [
    "RAW_SCHEMA",
    "STEP_VERSION",
    "HubSource",
    "OtherHubSource",
    "SourceDescription",
    "SourceFile",
    "describe_source",
    "fetch_dataset",
    "read_shards",
]
