"""Peak memory of fetch, normalize and pack over ten times the rows. `prepare.py --memory N` calls it.

In: rows, a tokenizer. Out: for each step its peak RSS, in a process of its own, at N and at 10 N rows, and their ratio.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

STEPS = ("fetch", "normalize", "pack")
TARGET = 1.2


def measure_memory(folder: Path, tokenizer: Path, template: str | None, rows: Iterable[str], count: int) -> None:
    """Print both peaks of each step. `rows`: lines of JSON, at least 10 `count`."""
    taken = iter(rows)
    peaks = []
    for size in (count, 10 * count):
        work = folder / f"memory-{size}"
        work.mkdir()
        with (work / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(line for _, line in zip(range(size), taken, strict=False))
        peaks.append({step: _peak(step, work, tokenizer, template) for step in STEPS})
        print(f"  {size} rows: " + ", ".join(f"{step} {peak:.0f} MB" for step, peak in peaks[-1].items()), flush=True)
    for step in STEPS:
        print(f"memory  {step} {peaks[1][step] / peaks[0][step]:.3f} times for 10 times the rows (target {TARGET})")


def _peak(step: str, work: Path, tokenizer: Path, template: str | None) -> float:
    command = [sys.executable, __file__, step, str(work), str(tokenizer), json.dumps(template)]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(child.stdout.splitlines()[-1])


def run_step(step: str, work: Path, tokenizer: Path, template: str | None) -> None:
    """Run one step on what the one before left in `work`."""
    from sft_core.recipe import DatasetConfig, NormalizeConfig, PackConfig

    out = work / step
    out.mkdir()
    if step == "fetch":
        from sft_core.fetch import fetch_dataset

        fetch_dataset(DatasetConfig(path=str(work / "rows.jsonl")), out)
    elif step == "normalize":
        from sft_core.normalize import NormalizeSource, normalize_dataset

        source = NormalizeSource(rows=work / "fetch", map_fn="alpaca", name="made")
        normalize_dataset([source], NormalizeConfig(), 0.01, 42, out)
    else:
        from sft_core.pack import pack_dataset

        pack_dataset(work / "normalize", tokenizer, PackConfig(chat_template=template), 42, out)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run_step(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
