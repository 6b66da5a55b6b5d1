"""Normalize `rows.jsonl` of the current folder on a Dask cluster, by a map_fn of the user's own; run by
test_shard_mapping. Prints how many rows came out."""

import sys
from pathlib import Path

import sft_cli  # noqa: F401 - as `sft` and flow runs come in


def main(address: str, map_fn: str) -> None:
    """Everything, below the current folder."""
    from prefect import flow

    from sft_core.fetch import fetch_dataset
    from sft_core.normalize import NormalizeSource, normalize_dataset
    from sft_core.recipe import DatasetConfig, NormalizeConfig
    from sft_core.recipe.sections import ComputeConfig
    from sft_core.shards import Sharding
    from tasks.shard_mapping import shard_mapper

    fetch_dataset(DatasetConfig(path="rows.jsonl"), Path("raw"))

    @flow
    def normalize() -> int:
        source = NormalizeSource(rows=Path("raw"), map_fn=map_fn, name="made")
        with shard_mapper(ComputeConfig(dask=address)) as mapper:
            facts = normalize_dataset([source], NormalizeConfig(), 0.2, 0, Path("out"), Sharding(mapper=mapper))
        return int(facts.ledger["rows"]["out"])

    print("rows out", normalize())


if __name__ == "__main__":
    main(*sys.argv[1:])
