"""A first card, in one short run: `python benchmarks/gpu_check.py [--seconds 540] [--only ladder,product]`.

Needs neither Prefect nor MLflow nor a network: a Llama 3.1 8B shape gets random weights. Stages in order of worth, each
caught and timed, so a fault costs its stage only; what has not begun when the time is up is left out. Every figure is
printed at once, as a JSON line (and kept in $OUT/check.jsonl), the forecast of `sft explain --gpu` beside it; a table
with the misses of over 20% comes last.

    facts      versions, what torch sees, speed of a large product and of a copy
    attention  the product's attention against float32, the same bits twice
    ladder     one QLoRA micro-batch, each speed-up added to those before: tokens/s, peak, loss and gradient norm
    product    `train_adapter`'s real child under ZeRO-2: speed, memory, stop and resume; convert, merge, evaluate, chat
    peers      transformers + PEFT as they come, and TRL where it is installed, on the same rows
    nf4        what 4 bits cost a product; whether a CPU quantises to the same bits
    head       the chunked loss against liger's

`--toy` runs everything on a CPU in a toy shape, and is what the tests run. Exit status 1 if a stage failed.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("facts", "attention", "ladder", "product", "peers", "nf4", "head")


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; how many failed, as 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--seconds", type=float, default=540, help="no stage or variant begins after these")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(STAGES):
        parser.error(f"--only: no such stage: {', '.join(sorted(unknown))}")
    sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "benchmarks")) if folder not in sys.path]
    from gpu_check_bench import Bench

    with tempfile.TemporaryDirectory(prefix="sft-gpu-") as folder:
        out = Path(os.environ.get("OUT", folder)) / "check.jsonl"
        bench = Bench(toy=options.toy, end=time.monotonic() + options.seconds, folder=Path(folder), out=out)
        stages = _stages()
        failed = [name for name in STAGES if name in options.only.split(",") and not _run(bench, name, stages[name])]
        bench.table()
    return int(bool(failed))


def _stages() -> dict[str, Callable[..., dict[str, object]]]:
    import gpu_check_kernels as kernels
    from gpu_check_ladder import ladder
    from gpu_check_peers import peers
    from gpu_check_product import product

    return {
        "facts": kernels.facts,
        "attention": kernels.attention,
        "ladder": ladder,
        "product": product,
        "peers": peers,
        "nf4": kernels.nf4,
        "head": kernels.head,
    }


def _run(bench: Any, name: str, stage: Callable[..., dict[str, object]]) -> bool:
    """Whether it went through, or its time had not come."""
    import torch

    if bench.is_over():
        bench.say(name, left_out="the time was up")
        return True
    started = time.monotonic()
    try:
        bench.say(name, **stage(bench), seconds=round(time.monotonic() - started, 1))
        return True
    except Exception as error:  # noqa: BLE001 - the next stage is worth its own figures
        bench.say(name, FAULT=repr(error)[:300], where=traceback.format_exc()[-900:])
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
