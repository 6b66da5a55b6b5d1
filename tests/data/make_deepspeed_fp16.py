"""Write `deepspeed_fp16.tar.xz` beside this file: float16 checkpoints of real DeepSpeed runs, with their fp32 masters.

DeepSpeed trains in float16 only on a processor with AVX512-FP16, so the tests cannot make these anew everywhere. Its
probe is overridden here: torch multiplies float16 on any processor, slowly. Run when DeepSpeed's file layout changes:

    python tests/data/make_deepspeed_fp16.py
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).with_name("deepspeed_fp16.tar.xz")
RANKS = (1, 2)


def main() -> None:
    """Train with one rank and two, and pack what convert reads: `RANKS/RUN/{base,checkpoint-3,masters}`."""
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in RANKS:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            folder = f"{scratch}/{ranks}"
            subprocess.run([sys.executable, *torchrun, __file__, folder], env=environment, check=True)
        with tarfile.open(OUT, "w:xz", preset=9) as archive:
            for ranks in RANKS:
                archive.add(f"{scratch}/{ranks}", arcname=str(ranks), filter=_packed)


def _packed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
    left_out = "checkpoint-2" in entry.name or entry.name.endswith(".py")  # DeepSpeed's own converters
    return None if left_out else entry


def rank(folder: Path) -> None:
    """One rank of all float16 runs."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from tests.sft_core.deepspeed_runs import RUNS, train

    type(get_accelerator()).is_fp16_supported = lambda _: True
    for name, run in RUNS.items():
        if run[1] == "float16":
            train(folder / name, *run)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]))
    else:
        main()
