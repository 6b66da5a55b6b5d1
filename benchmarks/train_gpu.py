"""How quick is training on a GPU? `python benchmarks/train_gpu.py --preset 8b [--methods qlora lora] [--peer trl]`.

Needs neither Prefect nor MLflow nor a network: a Llama of the preset's shape gets random weights. Out: a line of JSON
for each measurement and a table last: tokens a second, MFU (4 N FLOPs a token: the base is frozen, so 2 N forward and
2 N for the gradients of activations; recomputation is not counted), peak memory, and the loss of one batch, which every
variant must share. Variants add up in the order of `--variants`; the peer has the baseline's rows and settings.
Then the checks: packed documents isolated on this device, a stopped and resumed `train_adapter` equal to a straight
one.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
LOSS_TOLERANCE = 2e-2
"""Relative; bf16 has three digits."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table. `peak_gib` is None on a CPU; `fault` says why there are no figures."""

    method: str
    variant: str
    rows: int
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    peak_gib: float | None = None
    loss: float = 0.0
    notes: str = ""
    fault: str = ""


def main(arguments: list[str] | None = None) -> list[Measurement]:
    """Measure, check, print; what was measured."""
    options = _options(arguments)
    for folder in (str(ROOT), str(ROOT / "benchmarks")):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from train_gpu_model import PRESETS, VARIANTS, device_at_hand

    device, preset = device_at_hand(), PRESETS[options.preset]
    print(f"device {device}, preset {options.preset}, rows of {preset.row_tokens}, {options.peak_tflops:g} TFLOP/s")
    done: list[Measurement] = []
    for method in options.methods:
        if options.peer != "none":
            done.append(_tried(lambda m=method: _peer(options, preset, m, device), method, options.peer))
            print(json.dumps(asdict(done[-1])), flush=True)
        for name in options.variants:
            chosen = VARIANTS[: VARIANTS.index(name) + 1]
            done.append(_tried(lambda m=method, c=chosen: _ours(options, preset, m, c, device), method, name))
            print(json.dumps(asdict(done[-1])), flush=True)
    table(done)
    if not options.no_checks:
        from train_gpu_checks import check_isolated, check_resume

        for method in options.methods:
            print(f"isolation, {method}: {check_isolated(preset, method, device)}", flush=True)
            print(f"resume, {method}: {check_resume(method, device)}", flush=True)
    return done


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = ["baseline", "no-checkpointing", "loss", "attention", "half-norms", "liger", "compile"]
    parser.add_argument("--preset", choices=["8b", "toy"], default="8b")
    parser.add_argument("--methods", nargs="+", choices=["qlora", "lora"], default=["qlora", "lora"])
    parser.add_argument("--peer", choices=["trl", "peft", "none"], default="peft", help="measured beside")
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, help="each keeps those before it")
    parser.add_argument("--rows", type=int, help="packed rows a step (the preset's: 8b 4, so 16,384 tokens)")
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps, after {WARM_UP} of warm-up")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="ceiling for MFU: an H200's, as measured")
    parser.add_argument("--no-checks", action="store_true", help="leave isolation and resume out")
    return parser.parse_args(arguments)


def _tried(measure: Any, method: str, variant: str) -> Measurement:
    """A variant that does not fit or does not run is a line of the table too, and the next one is measured."""
    import torch

    try:
        return measure()
    except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
        return Measurement(method, variant, 0, fault=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ours(options: Any, preset: Any, method: str, variants: tuple[str, ...], device: Any) -> Measurement:
    """Steps of forward, backward, clipping and AdamW over packed rows."""
    import torch
    from train_gpu_model import autocast, batch_of, packed_documents, ready_model

    rows = options.rows or preset.rows
    ready = ready_model(preset, method, variants, device)
    trained = [parameter for parameter in ready.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=device.type == "cuda")
    batches = [batch_of(packed_documents(preset, rows, seed), device) for seed in range(WARM_UP + options.steps)]

    def step(batch: dict[str, Any]) -> Any:
        with autocast(device):
            loss = ready.step_loss(ready.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = step(batches[0])  # the untrained model's, on the same batch in every variant
    for batch in batches[1:WARM_UP]:
        step(batch)
    _synchronize(device, reset=True)
    started = time.perf_counter()
    for batch in batches[WARM_UP:]:
        step(batch)
    _synchronize(device)
    speed = options.steps * rows * preset.row_tokens / (time.perf_counter() - started)
    notes = "; ".join(ready.notes)
    line = Measurement(method, variants[-1], rows, tokens_per_second=speed, loss=float(first), notes=notes)
    return _measured(options, line, ready.parameters)


def _peer(options: Any, preset: Any, method: str, device: Any) -> Measurement:
    """TRL's SFTTrainer, or transformers' Trainer over PEFT, on the same rows with their defaults for a packed run."""
    from train_gpu_peers import run_peer

    rows = options.rows or preset.rows
    _synchronize(device, reset=True)
    speed, loss, parameters, note = run_peer(options.peer, preset, method, (rows, WARM_UP, options.steps), device)
    line = Measurement(method, options.peer, rows, tokens_per_second=speed, loss=loss, notes=note)
    return _measured(options, line, parameters)


def _measured(options: Any, line: Measurement, parameters: int) -> Measurement:
    """With what follows from the speed, and the peak so far."""
    import torch

    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    mfu = line.tokens_per_second * 4 * parameters / (options.peak_tflops * 1e12)
    return replace(line, mfu=mfu, peak_gib=peak)


def _synchronize(device: Any, reset: bool = False) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)


def table(done: list[Measurement]) -> None:
    """All of them, with the ratio to the peer and a mark where the loss is not the baseline's."""
    print(f"\n{'method':6} {'variant':17} {'rows':>4} {'tokens/s':>10} {'MFU 4N':>7} {'GiB':>6} {'peer':>5}  loss")
    for one in done:
        peer = next((p for p in done if p.method == one.method and p.variant in ("trl", "peft")), None)
        base = next((b for b in done if b.method == one.method and b.variant == "baseline"), None)
        if one.fault:
            print(f"{one.method:6} {one.variant:17} {one.fault}")
            continue
        ratio = f"{one.tokens_per_second / peer.tokens_per_second:5.2f}" if peer and peer.tokens_per_second else "    -"
        peak = "-" if one.peak_gib is None else f"{one.peak_gib:.1f}"
        same = base is None or not base.loss or abs(one.loss - base.loss) <= LOSS_TOLERANCE * base.loss
        print(
            f"{one.method:6} {one.variant:17} {one.rows:4} {one.tokens_per_second:10,.0f} {one.mfu:7.1%} {peak:>6} "
            f"{ratio}  {one.loss:.4f}{'' if same else '  NOT THE BASELINE LOSS'}  {one.notes}"
        )


if __name__ == "__main__":
    main()
