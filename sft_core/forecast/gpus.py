"""GPUs that a forecast can be made for: memory, and what of their speed a long training keeps.

Memory as `nvidia-smi` shows it. Speeds are the makers' data sheets (dense bfloat16 with float32 sums; memory bandwidth)
times the shares below. On one H200 a large product was measured at 790 TFLOP/s (0.80 of 989) and a copy at 4.3 TB/s
(0.90 of 4.8); a training's products are smaller and the chip runs warm, so less is assumed.
"""

import re
from dataclasses import dataclass

from sft_core.errors import RecipeError

MATMUL_SHARE, COPY_SHARE = 0.66, 0.78
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """`memory` in bytes; `flops` and `bandwidth` a second, as a long training keeps them."""

    name: str
    memory: int
    flops: float
    bandwidth: float


def _gpu(name: str, mib: int, tflops: float, tb_a_second: float) -> Gpu:
    return Gpu(name, mib * MIB, tflops * 1e12 * MATMUL_SHARE, tb_a_second * 1e12 * COPY_SHARE)


GPUS = {
    "b200": _gpu("NVIDIA B200", 183_359, 2250, 8.0),
    "h200": _gpu("NVIDIA H200", 143_771, 989, 4.8),
    "h100": _gpu("NVIDIA H100 80GB", 81_559, 989, 3.35),
    "a100-80gb": _gpu("NVIDIA A100 80GB", 81_920, 312, 2.04),
    "a100-40gb": _gpu("NVIDIA A100 40GB", 40_960, 312, 1.555),
    "l40s": _gpu("NVIDIA L40S", 46_068, 362, 0.864),
    "a10": _gpu("NVIDIA A10", 23_028, 125, 0.6),
    "l4": _gpu("NVIDIA L4", 23_034, 121, 0.3),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 24_564, 165, 1.008),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 24_576, 71, 0.936),
}
CPU = Gpu("CPU", 0, 50e9, 10e9)
"""For choosing only: no speed is promised of it."""


def read_gpu(text: str) -> tuple[Gpu, int | None]:
    """The GPU that `text` names, and how many of them where it says so. RecipeError for a name that is not known.

    >>> gpu, number = read_gpu("8xh100")
    >>> gpu.name, number
    ('NVIDIA H100 80GB', 8)
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", text.strip().lower())
    if match is None or match[2] not in GPUS:
        raise RecipeError(f"--gpu {text}: not known; take one of {', '.join(GPUS)}, or several as in 8xh100")
    return GPUS[match[2]], int(match[1]) if match[1] else None


def gpu_at_hand(name: str, memory: int) -> Gpu:
    """The known one that torch's device `name` fits best, with this device's memory; an H100's speeds for any other."""
    words = set(re.findall(r"\w+", name.lower()))
    known = max(GPUS.values(), key=lambda gpu: len(words & set(re.findall(r"\w+", gpu.name.lower())) - {"nvidia"}))
    if not words & set(re.findall(r"\w+", known.name.lower())) - {"nvidia"}:
        known = GPUS["h100"]
    return Gpu(name, memory, known.flops, known.bandwidth)
