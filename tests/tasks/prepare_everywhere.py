"""Normalize and pack one data set in this process, in two processes, and on a Dask cluster of two workers; run by
test_shard_mapping. Prints the hash of every file, the number of shards and of Prefect task runs, and who worked."""

import json
import random
import sys
from pathlib import Path

ROWS = 30_000


def main(folder: Path, tokenizer: Path) -> None:
    """Everything, below `folder`."""
    from distributed import LocalCluster
    from prefect import flow
    from prefect.client.orchestration import get_client

    from sft_core.fetch import fetch_dataset
    from sft_core.fingerprint import hash_folder
    from sft_core.normalize import NormalizeSource, normalize_dataset
    from sft_core.pack import pack_dataset
    from sft_core.recipe import DatasetConfig, NormalizeConfig, PackConfig
    from sft_core.recipe.sections import ComputeConfig
    from sft_core.shards import Sharding, read_shard_list
    from tasks.shard_mapping import shard_mapper

    drawn = random.Random(0)
    lines = [{"instruction": f"say {n}", "output": f"{drawn.random()} {n}" if n % 97 else ""} for n in range(ROWS)]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fetch_dataset(DatasetConfig(path=str(rows)), folder / "raw")

    @flow
    def prepare(where: str, compute: ComputeConfig) -> None:
        source = NormalizeSource(rows=folder / "raw", map_fn="alpaca", name="made")
        with shard_mapper(compute) as mapper:
            sharding, out = Sharding(mapper=mapper), folder / where
            normalize_dataset([source], NormalizeConfig(), 0.02, 0, out / "n", sharding)
            pack_dataset(out / "n", tokenizer, PackConfig(chat_template="chatml"), 0, out / "p", sharding)

    prepare("here", ComputeConfig(num_proc=1))
    prepare("processes", ComputeConfig(num_proc=2))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        prepare("dask", ComputeConfig(dask=cluster.scheduler_address))
    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_task_runs()]
    print(
        json.dumps(
            {
                "hashes": {where: hash_folder(folder / where) for where in ("here", "processes", "dask")},
                "shards": len(read_shard_list(folder / "here" / "p")),
                "task_runs": sum(name.startswith("make-shards") for name in names),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
