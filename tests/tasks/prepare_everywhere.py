"""Normalize and pack one data set in this process, in two processes, and on a Dask cluster, by a map_fn of the user's;
run by test_shard_mapping in the user's folder. Prints the hash of every file, the numbers of rows, of shards and of
Prefect task runs."""

import json
import sys
from pathlib import Path

import sft_cli  # noqa: F401 - as `sft` and flow runs come in


def main(tokenizer: Path, map_fn: str, address: str) -> None:
    """Everything, below the current folder."""
    from prefect import flow
    from prefect.client.orchestration import get_client

    from sft_core import shard_rows
    from sft_core.fetch import fetch_dataset
    from sft_core.fingerprint import hash_folder
    from sft_core.normalize import NormalizeSource, normalize_dataset
    from sft_core.pack import pack_dataset
    from sft_core.recipe import DatasetConfig, NormalizeConfig, PackConfig
    from sft_core.recipe.sections import ComputeConfig
    from sft_core.shards import Sharding, read_shard_list
    from tasks.shard_mapping import shard_mapper

    folder, rows = Path("work"), {}
    shard_rows.LEAST_ROWS = shard_rows.ROWS_PER_CUT = 64  # fetch cuts the shards: small ones, so that few rows do
    fetch_dataset(DatasetConfig(path="rows.jsonl"), folder / "raw")

    @flow
    def prepare(where: str, compute: ComputeConfig) -> None:
        source = NormalizeSource(rows=folder / "raw", map_fn=map_fn, name="made")
        with shard_mapper(compute) as mapper:
            sharding, out = Sharding(mapper=mapper), folder / where
            outcome = normalize_dataset([source], NormalizeConfig(), 0.1, 0, out / "n", sharding)
            pack_dataset(out / "n", tokenizer, PackConfig(chat_template="chatml"), 0, out / "p", sharding)
        rows[where] = outcome.ledger["rows"]["out"]

    prepare("here", ComputeConfig(num_proc=1))
    prepare("processes", ComputeConfig(num_proc=2))
    prepare("dask", ComputeConfig(dask=address))
    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_task_runs()]
    print(
        json.dumps(
            {
                "hashes": {where: hash_folder(folder / where) for where in ("here", "processes", "dask")},
                "rows": rows,
                "shards": len(read_shard_list(folder / "here" / "p")),
                "task_runs": sum(name.startswith("make-shards") for name in names),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
