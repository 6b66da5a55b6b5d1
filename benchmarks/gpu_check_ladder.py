"""The ladder of `gpu_check.py`: one QLoRA micro-batch, each speed-up added to those before, forecasts beside.

As DeepSpeed runs it: all in bfloat16, no autocast. Loss and gradient norm of the same rows must stay.
"""

import gc
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_check_bench import Bench
from gpu_check_model import batch_of, packed_documents, random_base

STEPS = 4
"""Timed micro-batches of a variant, after two that warm up; one at toy size."""
NEEDS_SECONDS = 45.0
"""Left for the later stages' first figures."""
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-2, 5e-2
"""Relative, between variants without dropout; half precision has three digits."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What is switched on, as the forecast takes it."""

    name: str
    rows: int = 1
    every: int = 1
    dropout: float = 0.0
    fused: bool = False
    liger: bool = False


class Ladder:
    """One model, changed step by step."""

    def __init__(self, bench: Bench) -> None:
        from peft import LoraConfig, get_peft_model

        from sft_core.train.attention import use_packed_attention
        from sft_core.train.loss import choose_loss

        self.bench = bench
        self.base, self.parameters = random_base(bench.preset, "qlora", bench.device)
        settings = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        self.model = get_peft_model(self.base, settings)
        torch.manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                value = torch.randn_like(parameter) * 0.01 if "lora_B" in name else parameter.data
                parameter.data = value.to(torch.bfloat16)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        attention = use_packed_attention(self.model)
        self.way, why = choose_loss(self.model)
        self.model.train()
        bench.say("ladder", attention=attention, loss=[self.way, why], weights_gib=bench.peak_gib())
        self.counted: dict[Variant, Any] = {}
        self.reference: tuple[float, float] | None = None

    def step(self, rows: int, seed: int) -> tuple[float, float]:
        """Loss and gradient norm of some rows."""
        loss = self._backward(self._batch(rows, seed))
        norm = torch.stack([parameter.grad.float().norm() for parameter in self.trained]).norm()
        self._forget_gradients()
        return float(loss), float(norm)

    def measure(self, variant: Variant) -> None:
        """One line of the table; a fault is a line too."""
        bench = self.bench
        if bench.is_over(0 if bench.toy else NEEDS_SECONDS):
            bench.say("ladder", variant=variant.name, left_out="the time was up")
            return
        self._recompute(variant.every)
        try:
            figures = self._figures(variant)
        except Exception as error:  # noqa: BLE001 - out of memory, or a kernel's own
            bench.speed("ladder", variant.name, fault=f"{type(error).__name__}: {str(error)[:160]}")
        else:
            bench.speed("ladder", variant.name, rows=variant.rows, **figures, **self._forecast(variant))
            self._check(variant, figures)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()

    def _figures(self, variant: Variant) -> dict[str, Any]:
        bench, rows = self.bench, variant.rows
        steps = 1 if bench.toy else STEPS
        self.step(rows, 0)
        self.step(rows, 1)
        batch = self._batch(rows, 5)
        bench.sync()
        bench.forget_peak()
        started = time.perf_counter()
        self._backward(batch)
        host = time.perf_counter() - started
        for _ in range(steps - 1):
            self._backward(batch)
        bench.sync()
        seconds = (time.perf_counter() - started) / steps
        peak = bench.peak_gib()
        self._forget_gradients()
        loss, norm = self.step(1, 0)
        tokens = rows * bench.preset.row_tokens / seconds
        flops = tokens * 4 * self.parameters
        return {
            "tok_s": round(tokens),
            "tflops_4n": round(flops / 1e12, 1),
            "host_ms": round(host * 1e3),
            "peak_gib": peak,
            "loss": loss,
            "norm": norm,
        }

    def _check(self, variant: Variant, figures: dict[str, Any]) -> None:
        if variant.dropout:
            return
        found = (figures["loss"], figures["norm"])
        assert all(map(math.isfinite, found)), f"{variant.name}: loss and gradient norm {found}"
        self.reference = self.reference or found
        for value, expected, tolerance in zip(found, self.reference, (LOSS_TOLERANCE, NORM_TOLERANCE), strict=True):
            if abs(value - expected) > tolerance * expected:
                raise AssertionError(f"{variant.name}: loss and gradient norm {found}, before {self.reference}")

    def _forecast(self, variant: Variant) -> dict[str, Any]:
        """By the product's own forecast, without what a bare model has not: DeepSpeed, optimizer, CUDA's context."""
        from sft_core.forecast import CPU, Forecaster, Split, Trains, gpu_at_hand
        from sft_core.recipe import LoraConfig, TrainConfig

        bench = self.bench
        lora = LoraConfig(lora_dropout=variant.dropout)
        section = TrainConfig(lora=lora, fused_lora=variant.fused)
        gpu = CPU
        if bench.cuda:
            properties = torch.cuda.get_device_properties(bench.device)
            gpu = gpu_at_hand(properties.name, properties.total_memory)
        key = replace(variant, name="", rows=1, every=0)
        if key not in self.counted:
            trains = Trains(
                config=self.base.config,
                train=section,
                max_length=bench.preset.row_tokens,
                ranks=1,
                liger=variant.liger,
            )
            self.counted[key] = Forecaster(trains, gpu)
        told = self.counted[key].of(Split(variant.rows, 1, variant.every))
        held = told.kept["4-bit weights"] + told.kept["other weights"] + told.kept["adapter"] * 2  # and gradients
        peak = held + told.activations + max(told.logits, told.backward)
        return {"forecast_tok_s": round(told.tokens_per_second), "forecast_peak_gib": round(peak / 2**30, 2)}

    def _batch(self, rows: int, seed: int) -> dict[str, Any]:
        return batch_of(packed_documents(self.bench.preset, rows, seed), self.bench.device)

    def _backward(self, batch: dict[str, Any]) -> torch.Tensor:
        from sft_core.train.loss import supervised_loss

        loss = supervised_loss(self.model, batch, None, self.way)
        loss.backward()
        return loss.detach()

    def _forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _recompute(self, every: int) -> None:
        if not every:
            self.base.gradient_checkpointing_disable()
            return
        more = {"every_n_layers": every} if every > 1 else {}
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **more)


def ladder(bench: Bench) -> dict[str, Any]:
    """As the defaults are, then one thing after another."""
    from sft_core.train.fused_lora import fuse_lora
    from sft_core.train.liger import use_liger

    steps = Ladder(bench)
    plain = Variant("PEFT, dropout, all recomputed", dropout=0.05)
    steps.measure(plain)
    profile(bench, lambda: steps.step(1, 0))
    steps.measure(replace(plain, name="nothing recomputed", every=0))
    for module in steps.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Identity()
    steps.measure(Variant("all recomputed, dropout 0"))
    bench.say("ladder", fused=fuse_lora(steps.model))
    fused = Variant("+ LoRA by addmm", fused=True)
    steps.measure(fused)
    liger = use_liger(steps.model)
    bench.say("ladder", liger=liger)
    best = replace(fused, liger=liger == "liger kernels")
    if best.liger:
        steps.measure(replace(best, name="+ liger kernels"))
    for rows, every in ((1, 0), (2, 0), (4, 2), (4, 1)):
        told = {0: "nothing", 1: "all"}.get(every, f"one in {every}")
        steps.measure(replace(best, name=f"all that, {told} recomputed, {rows} rows", rows=rows, every=every))
    steps._recompute(0)
    profile(bench, lambda: steps.step(1, 0))
    return {}


def profile(bench: Bench, work: Any) -> None:
    """The dearest kernels of one call."""
    from torch.profiler import ProfilerActivity

    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        started = time.perf_counter()
        work()
        bench.sync()
        wall = time.perf_counter() - started

    def cost(event: Any) -> float:
        return float(event.self_device_time_total if bench.cuda else event.self_cpu_time_total)

    events = sorted(profiled.key_averages(), key=cost, reverse=True)
    top = [(event.key[:60], event.count, round(cost(event) / 1e3, 1)) for event in events[:14]]
    bench.say("profile", wall_ms=round(wall * 1e3), device_ms=round(sum(map(cost, events)) / 1e3), top=top)
