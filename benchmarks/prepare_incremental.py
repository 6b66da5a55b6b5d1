"""Preparing again after 1% of new rows, over preparing from nothing. `prepare.py --incremental` calls it.

In: rows, a tokenizer. Out: seconds of describe, fetch, normalize and pack by the wall, and of CPU over all threads:
from nothing, with new rows at the end, and with new rows in one place in the middle; each taken from the first one's
folders where it can be.
"""

import json
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

FRACTION = 0.01
TARGET = 0.05


def measure_incremental(
    folder: Path, tokenizer: Path, template: str | None, rows: Iterable[tuple[str, str]], count: int
) -> None:
    """Print seconds a step, and the ratio of each change to the whole."""
    taken = iter(rows)
    old = [line(*pair) for pair in islice(taken, count)]
    new = [line(*pair) for pair in islice(taken, max(1, round(count * FRACTION)))]
    middle = count // 2
    warm = _prepare(folder / "warm", old[:2000], tokenizer, template, None)  # imports, caches
    del warm
    whole = _prepare(folder / "whole", old, tokenizer, template, None)
    _say("from nothing", whole, None)
    for name, lines in (("1% appended", old + new), ("1% inserted", old[:middle] + new + old[middle:])):
        again = _prepare(folder / name.replace("% ", "-"), lines, tokenizer, template, folder / "whole")
        _say(name, again, whole)


def line(question: str, answer: str) -> str:
    """An alpaca row as a line of JSON."""
    return json.dumps({"instruction": question, "input": "", "output": answer}, ensure_ascii=False) + "\n"


def _prepare(
    folder: Path, lines: list[str], tokenizer: Path, template: str | None, earlier: Path | None
) -> dict[str, Any]:
    """Prepare `lines` in `folder`; seconds a step."""
    from sft_core.fetch import describe_source, fetch_dataset
    from sft_core.normalize import NormalizeSource, normalize_dataset
    from sft_core.pack import pack_dataset
    from sft_core.recipe import DatasetConfig, NormalizeConfig, PackConfig
    from sft_core.shards import EarlierFolder, Sharding

    folder.mkdir(parents=True)
    source = folder / "rows.jsonl"
    source.write_text("".join(lines), "utf-8")
    dataset = DatasetConfig(path=str(source), map_fn="alpaca")
    clock = [clocks()]

    def sharding(step: str) -> Sharding:
        return Sharding(earlier=EarlierFolder(earlier / step)) if earlier else Sharding()

    def out(step: str) -> Path:
        (folder / step).mkdir()
        return folder / step

    description = describe_source(dataset)
    clock.append(clocks())
    fetch_dataset(dataset, out("fetch"), description, sharding=sharding("fetch"))
    clock.append(clocks())
    inputs = [NormalizeSource(rows=folder / "fetch", map_fn="alpaca", name="made")]
    normalize_dataset(inputs, NormalizeConfig(), 0.01, 42, out("normalize"), sharding=sharding("normalize"))
    clock.append(clocks())
    config = PackConfig(chat_template=template)
    pack_dataset(folder / "normalize", tokenizer, config, 42, out("pack"), sharding=sharding("pack"))
    clock.append(clocks())
    names = ("describe", "fetch", "normalize", "pack")
    return {name: end - start for name, start, end in zip(names, clock, clock[1:], strict=False)}


def _say(name: str, seconds: dict[str, Any], whole: dict[str, Any] | None) -> None:
    steps = ", ".join(f"{step} {took[0]:.2f}" for step, took in seconds.items())
    total = sum(seconds.values())
    ratios = total / sum(whole.values()) if whole else None
    ratio = f": {ratios[0]:.3f} of it (target {TARGET}), {ratios[1]:.3f} by CPU" if ratios is not None else ""
    print(f"{name:13} {total[0]:6.2f} s, CPU {total[1]:.2f} s ({steps}){ratio}", flush=True)


def clocks() -> Any:
    """Seconds by the wall, and of CPU over all threads."""
    return np.array([time.perf_counter(), time.process_time()])
