"""The normalize step itself.

In: folders that fetch wrote, each with its map_fn. Out, below `out`: a shard for each of fetch's shards (see `shard`;
`shards.json` lists them), and the held-out side and the quarantine, put together from them (see `heldout`). Memory
holds one shard at a time; what grows is the held-out side's ids and signatures.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_core.artifacts import Outcome
from sft_core.fingerprint import hash_value
from sft_core.normalize.heldout import HeldOutWriter, settle
from sft_core.normalize.identity import map_fn_source
from sft_core.normalize.limits import check_sides
from sft_core.normalize.load import shipped_name
from sft_core.normalize.reads import added_system
from sft_core.normalize.shard import ShardWork, load_once, make_shard
from sft_core.normalize.sketch import PARAMETERS
from sft_core.normalize.tally import Tally
from sft_core.recipe import NormalizeConfig
from sft_core.shards import Sharding, ShardJob, ShardWriter, build_shards, read_shard_list

STEP_VERSION = 6
RAW = "rows/*.parquet"
ALL_HERE = Sharding()
"""Every shard is made, in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizeSource:
    """A fetched data set: `rows` is fetch's folder, `name` what reports call it; `held_out`: for evaluation only. A
    `weight` below 1 samples rows; above 1 it is carried along for pack, and each row is written once."""

    rows: Path
    map_fn: str
    name: str
    weight: float = 1.0
    held_out: bool = False


def normalize_dataset(
    sources: Sequence[NormalizeSource],
    config: NormalizeConfig,
    eval_fraction: float,
    seed: int,
    out: Path,
    sharding: Sharding = ALL_HERE,
) -> Outcome:
    """Write both sides and the quarantine. DataError when a side is empty."""
    jobs = plan_shards(sources, eval_fraction, seed)
    overlaps = any(source.held_out for source in sources)
    tally = sort_rows(jobs, config.near_duplicates, overlaps, out, sharding)
    check_sides(tally, {source.name: source.map_fn for source in sources})
    facts = tally.facts()
    for source in sources:
        if prompt := added_system(shipped_name(source.map_fn) or ""):
            facts["datasets"][source.name]["adds_system_prompt"] = prompt.strip()
    return Outcome(ledger=tally.ledger(), facts=facts)


def plan_shards(sources: Sequence[NormalizeSource], eval_fraction: float, seed: int) -> list[ShardJob]:
    """The shards to be, the training data sets' first. A map_fn that is not there fails here, before any work."""
    call = uuid.uuid4().hex
    for source in sources:
        load_once(source.map_fn, call)
    ordered = sorted(sources, key=lambda source: source.held_out)
    return [job for source in ordered for job in _jobs(source, 1.0 if source.held_out else eval_fraction, seed, call)]


def sort_rows(
    jobs: Sequence[ShardJob], near_duplicates: float | None, overlaps: bool, out: Path, sharding: Sharding = ALL_HERE
) -> Tally:
    """Write shards, both sides and the quarantine, whatever they hold."""
    quarantine = out / "quarantine" / "part-00000.jsonl"
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out, sharding.earlier)
    build_shards(jobs, make_shard, writer, sharding.mapper)
    writer.close()
    tally = Tally()
    aside = settle(out, writer.shards, near_duplicates, overlaps)
    with quarantine.open("w", encoding="utf-8", newline="\n") as file:
        held_out = HeldOutWriter(out, file, aside, tally)
        for shard in writer.shards:
            tally.add_shard(shard.facts, shard.place)
            held_out.add_shard(shard)
        held_out.close()
    return tally


def _jobs(source: NormalizeSource, eval_fraction: float, seed: int, call: str) -> Iterator[ShardJob]:
    identity = {
        "map_fn": map_fn_source(source.map_fn),
        "eval_fraction": eval_fraction,
        "sampled": [source.weight, seed] if source.weight < 1 else None,
        "signature": PARAMETERS,
        "version": STEP_VERSION,
    }
    for shard in read_shard_list(source.rows):
        work = ShardWork(
            path=shard.path(source.rows, RAW),
            map_fn=source.map_fn,
            eval_fraction=eval_fraction,
            weight=min(source.weight, 1.0),
            seed=seed,
            call=call,
        )
        key = hash_value({"rows": shard.files[RAW].sha256, **identity})
        yield ShardJob(key, work, {**shard.place, "dataset": source.name, "weight": source.weight})
