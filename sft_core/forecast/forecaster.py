"""Memory and speed of each way to split an optimizer step's rows, and the quickest that fits.

In: a model's configuration, the section `train`, the length of rows, a GPU, the number of ranks. Out: `Forecast`s. The
model is counted once with and once without recomputation (`counting.py`); rows and every-n-th layers follow from that.

A kernel takes as long as its arithmetic or its memory traffic, whichever is longer (the roofline), and a micro-batch at
least as long as the host needs to start its kernels. Not counted: communication between GPUs, an offloaded optimizer.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from sft_core.errors import RecipeError
from sft_core.forecast.counting import Counted, Way, count_micro_batch
from sft_core.forecast.gpus import CPU, Gpu
from sft_core.forecast.kept import kept_bytes
from sft_core.forecast.model import TrainedModel, trained_model
from sft_core.recipe import TrainConfig

MARGIN = 0.06
"""Of the free memory, left for what is not counted: the allocator's gaps, kernels' workspaces."""
HOST_SECONDS = 20e-6
"""To start one kernel from Python with PEFT, autograd and ZeRO's hooks: a 32-layer QLoRA micro-batch of 9,500 kernels
took 370 ms of a busy 2.5 GHz core, half of that is taken for a GPU's host."""
MOST_TOKENS = 65_536
"""Of a micro-batch: beyond it nothing is gained."""
AS_QUICK = 0.98
"""Of the quickest's speed: ways that are as quick are told apart by memory."""
EVERY = (0, 8, 4, 2, 1)
"""Which layers `gradient_checkpointing: auto` may recompute: none, every n-th, all."""


class NotCountedError(Exception):
    """The model's code does not run without numbers; the reason."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the rows of an optimizer step are taken on each rank: rows at once, how often, which layers recompute (0:
    none, 1: all, n: every n-th)."""

    rows: int
    accumulation: int
    checkpoint_every: int

    def __str__(self) -> str:
        """For people."""
        layers = {0: "no layer recomputed", 1: "all layers recomputed"}
        return (
            f"{self.rows} packed row{'s' if self.rows > 1 else ''} at once x {self.accumulation}, "
            f"{layers.get(self.checkpoint_every, f'one layer in {self.checkpoint_every} recomputed')}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one rank: bytes by what they hold; `logits` and `backward` are never there together."""

    split: Split
    kept: Mapping[str, float]
    activations: float
    logits: float
    backward: float
    tokens_per_second: float

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.kept.values()) + self.activations + max(self.logits, self.backward)

    @property
    def arithmetic(self) -> str:
        """The peak as a sum, for people."""
        work = ("logits", self.logits) if self.logits >= self.backward else ("one layer's work", self.backward)
        parts = [*self.kept.items(), ("activations", self.activations), work]
        return f"{size(self.peak)} = " + " + ".join(f"{name} {size(value)}" for name, value in parts if value)


def size(value: float) -> str:
    """Decimal gigabytes, megabytes where they are few.

    >>> size(5.67e9), size(84e6)
    ('5.7 GB', '84 MB')
    """
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trains:
    """What is trained: a transformers configuration, the recipe's section, tokens of a packed row, how many ranks;
    `liger`: with liger's kernels."""

    config: Any
    train: TrainConfig
    max_length: int
    ranks: int
    liger: bool = False
    trust_remote_code: bool = False


class Forecaster:
    """Counts when it is first asked, a few seconds."""

    def __init__(self, trains: Trains, gpu: Gpu) -> None:
        self.trains, self.gpu = trains, gpu
        self._tokens = math.ceil(trains.max_length / trains.train.sequence_parallel_size)
        self._counts: dict[bool, Counted] = {}  # by whether layers recompute

    @cached_property
    def model(self) -> TrainedModel:
        """RecipeError where the adapter does not fit it."""
        trains = self.trains
        return trained_model(trains.config, trains.train, trains.trust_remote_code)

    @cached_property
    def kept(self) -> dict[str, float]:
        """Bytes of one rank that do not depend on the split."""
        parts = kept_bytes(self.model, self.trains.train, self.trains.ranks)
        if self.gpu.name == CPU.name:
            del parts["CUDA and its libraries"]
        return parts

    def _counted(self, recomputing: bool) -> Counted:
        if recomputing not in self._counts:
            nf4 = self.trains.train.quantization == "nf4"
            way = Way(checkpoint_every=int(recomputing), nf4=nf4, liger=self.trains.liger)
            try:
                self._counts[recomputing] = count_micro_batch(self.model.model, self._tokens, way)
            except Exception as error:  # noqa: BLE001 - a model's code raises anything
                raise NotCountedError(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error
        return self._counts[recomputing]

    def of(self, split: Split) -> Forecast:
        """What `split` takes. NotCountedError where the model's code does not run without numbers."""
        share = 0.0  # of the layers, recomputed
        if split.checkpoint_every:
            share = math.ceil(self.model.layers / split.checkpoint_every) / self.model.layers
        ends = [(self._counted(kind), part) for kind, part in ((True, share), (False, 1 - share)) if part]
        seconds = sum(self._seconds(counted, split.rows) * part for counted, part in ends)
        return Forecast(
            split=split,
            kept=self.kept,
            activations=split.rows * sum(counted.saved * part for counted, part in ends),
            logits=self._logits(split.rows, ends[0][0]),
            backward=split.rows * max(counted.backward for counted, _ in ends),
            tokens_per_second=split.rows * self._tokens / seconds,
        )

    def _logits(self, rows: int, one: Counted) -> float:
        """Chunks of logits stay as large; the hidden states' gradient grows with the rows."""
        return one.logits + (rows - 1) * one.hidden if one.chunked else rows * one.logits

    def _seconds(self, counted: Counted, rows: int) -> float:
        """Of a micro-batch."""
        device = sum(
            work.times
            * max(rows * work.flops / self.gpu.flops, (rows * work.moved + work.weights) / self.gpu.bandwidth)
            for work in counted.work
        )
        host = 0.0 if self.gpu.name == CPU.name else HOST_SECONDS * sum(work.times for work in counted.work)
        return max(device, host)

    def splits(self) -> Iterator[Split]:
        """All that the recipe allows."""
        train = self.trains.train
        total = train.rows_at_once * train.gradient_accumulation_steps
        counts = [train.rows_at_once]
        if train.per_device_train_batch_size == "auto":
            counts = [n for n in range(1, total + 1) if total % n == 0 and (n == 1 or n * self._tokens <= MOST_TOKENS)]
        for rows in counts:
            for every in allowed_checkpointing(train.gradient_checkpointing, self.model.layers):
                yield Split(rows, total // rows, every)

    def choose(self, free: float, before: Split | None = None) -> Forecast:
        """The quickest split that fits into `free` bytes; `before`, if it does: a run that goes on stays as it was.
        RecipeError where none fits."""
        all_ = [self.of(split) for split in self.splits()]
        fitting = [one for one in all_ if one.peak <= free * (1 - MARGIN)]
        if not fitting:
            least = min(all_, key=lambda one: one.peak)
            if least.peak > free:
                raise RecipeError(self.refusal(least, free))
            return least
        known = next((one for one in fitting if one.split == before), None)
        quickest = max(one.tokens_per_second for one in fitting)
        good = [one for one in fitting if one.tokens_per_second >= AS_QUICK * quickest]
        return known or min(good, key=lambda one: one.peak)

    def refusal(self, forecast: Forecast, free: float) -> str:
        """Why it cannot fit, and what would."""
        train = self.trains.train
        total = train.rows_at_once * train.gradient_accumulation_steps
        freely = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto"}
        other = copy.copy(self)
        other.trains = replace(
            self.trains, train=train.model_copy(update=freely | {"gradient_accumulation_steps": total})
        )
        least = min((other.of(split) for split in other.splits()), key=lambda one: one.peak)
        help_ = "take a shorter pack.max_length, quantization: nf4, ZeRO with more GPUs, or a smaller model"
        if least.peak <= free:
            help_ = f"it would fit with {least.split} ({size(least.peak)}): set gradient_checkpointing and "
            help_ += "per_device_train_batch_size to auto, gradient_accumulation_steps to "
            help_ += str(total)
        return (
            f"train: does not fit {self.gpu.name}: {size(free)} are free, {forecast.split} needs about "
            f"{forecast.arithmetic}; {help_}"
        )


def allowed_checkpointing(key: bool | str, layers: int) -> tuple[int, ...]:
    """Values of `Split.checkpoint_every` that the recipe's key allows."""
    if key != "auto":
        return (1,) if key else (0,)
    selective = "every_n_layers" in inspect.signature(PreTrainedModel.gradient_checkpointing_enable).parameters
    return tuple(n for n in EVERY if n <= 1 or (selective and n < layers))
