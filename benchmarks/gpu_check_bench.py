"""What the stages of `gpu_check.py` share: the device, the clock, the figures said so far.

In: options. Out: JSON lines on stdout and in a file, and the table of speeds and peaks beside their forecasts.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_check_model import PRESETS, Preset, device_at_hand

MISS = 0.2
"""Relative difference from a forecast that is a finding."""


@dataclass(slots=True)
class Bench:
    """`end`: of the time, by the monotonic clock. `folder`: scratch. `out`: the JSON lines."""

    toy: bool
    end: float
    folder: Path
    out: Path
    device: torch.device = field(default_factory=device_at_hand)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def preset(self) -> Preset:
        """The shape."""
        return PRESETS["toy" if self.toy else "8b"]

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def is_over(self, needs: float = 0.0) -> bool:
        """Whether fewer than `needs` seconds are left."""
        return time.monotonic() + needs > self.end

    def say(self, stage: str, **facts: Any) -> None:
        """One JSON line."""
        line = json.dumps({"stage": stage, **facts}, default=str)
        print(line, flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def speed(self, stage: str, variant: str, **facts: Any) -> None:
        """A line that goes into the table: `tok_s`, `peak_gib`, and their forecasts."""
        self.rows.append({"variant": variant, **facts})
        self.say(stage, variant=variant, **facts)

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], times: int = 5) -> float:
        """A call, after two that warm up."""
        work()
        work()
        self.sync()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.sync()
        return round((time.perf_counter() - started) / times * 1e3, 3)

    def forget_peak(self) -> None:
        """Count the peak anew."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most that was allocated since; None on a CPU."""
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2) if self.cuda else None

    def table(self) -> None:
        """Speeds and peaks beside their forecasts; a mark where the forecast was off by more than `MISS`."""
        print(f"\n{'variant':38} {'tok/s':>8} {'forecast':>8} {'GiB':>6} {'forecast':>8}  loss, gradient norm")
        if not self.cuda:
            print("(speeds of a CPU at toy size say nothing of a GPU, nor of one variant against another)")
        for row in self.rows:
            if "fault" in row:
                print(f"{row['variant']:38} {row['fault'][:90]}")
                continue
            pairs = [(row.get(name), row.get(f"forecast_{name}")) for name in ("tok_s", "peak_gib")]
            cells = [f"{_cell(found, 8 - 2 * i, i)} {_cell(told, 8, i)}" for i, (found, told) in enumerate(pairs)]
            missed = any(found and told and abs(found / told - 1) > MISS for found, told in pairs)
            figures = ", ".join(f"{row[name]:.4f}" for name in ("loss", "norm") if name in row)
            print(f"{row['variant']:38} {' '.join(cells)}  {figures}{'  MISS' if missed and self.cuda else ''}")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference over the size of `expected`."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value:,.{digits}f}':>{width}}"
