"""Convert QLoRA checkpoints with a large frozen base beside the adapter: peak memory, and time against reading the
bytes.

In: `--gigabytes` of frozen bf16 weights, `--r`. Out: for a DeepSpeed ZeRO-2 checkpoint of two ranks whose model file
holds the base as well, and for XTuner's single `.pth` with its optimizer state: peak RSS of the converting process
over its start and in adapters, seconds against reading what is converted. Everything written is deleted.

    python -m benchmarks.convert --gigabytes 0.5
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER = 2048, 5632
LAYER = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # bytes in bf16
ATTENTION = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
MLP = {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
RANKS, STEP = 2, 10
READ_BYTES = 1 << 20


def main() -> None:
    """Print a few lines a layout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32, help="that are adapted; the frozen base has --gigabytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", nargs=3, default=None)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return
    frozen = max(1, round(arguments.gigabytes * 1e9 / LAYER))
    for layout in ("deepspeed", "xtuner"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            _measure(Path(scratch), layout, frozen, arguments)


def _measure(scratch: Path, layout: str, frozen: int, arguments: argparse.Namespace) -> None:
    trained = _trained(arguments.layers, arguments.r)
    write = _write_deepspeed if layout == "deepspeed" else _write_xtuner
    checkpoint, needed = write(scratch, trained, frozen)
    del trained
    _write_base(scratch / "base", arguments.layers)
    files = [path for path in scratch.rglob("*.p*t*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    child = [sys.executable, "-m", "benchmarks.convert", "--child", str(checkpoint), str(scratch), str(arguments.r)]
    results = []
    for _ in range(arguments.rounds):
        read = _read(files, needed)
        found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        results.append({**found, "read": read})
    ratios = sorted(result["again"] / result["read"] for result in results)
    best = sorted(results, key=lambda result: result["again"] / result["read"])[len(results) // 2]
    peak = max(result["peak_mb"] for result in results)
    adapter = (scratch / "out" / "adapter_model.safetensors").stat().st_size / 1e6
    print(f"{layout}: checkpoint {total / 1e6:,.0f} MB, adapter {adapter:,.0f} MB; load {os.getloadavg()[0]:.1f}")
    print(
        f"  peak RSS {peak:,.0f} MB, bound 500 + 4 x adapter = {500 + 4 * adapter:,.0f} MB; {best['before_mb']:,.0f} "
    )
    print(f"  before; {best['seconds']:.2f} s ({best['cpu']:.2f} s of CPU), {best['again']:.2f} s the second time;")
    print(
        f"  reading the {needed / 1e6:,.0f} MB that are converted {best['read']:.3f} s: {ratios[len(ratios) // 2]:.1f}"
    )
    print(f"  times as long (turns: {', '.join(f'{ratio:.1f}' for ratio in ratios)}), libraries loaded")


def _read(files: list[Path], nbytes: int) -> float:
    """Seconds to read so many bytes of the files, from the page cache."""
    clock = time.perf_counter()
    for path in sorted(files, key=lambda path: path.stat().st_size):
        with path.open("rb", buffering=0) as file:
            while nbytes > 0 and (data := file.read(READ_BYTES)):
                nbytes -= len(data)
    return time.perf_counter() - clock


def _child(checkpoint: str, scratch: str, r: str) -> None:
    """Convert twice in a process of its own; the libraries' imports are outside of the second clock."""
    from sft_core.convert import ConvertOptions, convert_checkpoint
    from sft_core.recipe import LoraConfig

    lora = LoraConfig(r=int(r), lora_alpha=16)
    times = []
    before = _peak_mb()
    for _ in range(2):
        shutil.rmtree(Path(scratch, "out"), ignore_errors=True)  # to write over a file costs what its removal costs
        clock, cpu = time.perf_counter(), time.process_time()
        options = ConvertOptions(base=Path(scratch, "base"))
        convert_checkpoint(Path(checkpoint), Path(scratch, "out"), lora, "base", options)
        times.append((time.perf_counter() - clock, time.process_time() - cpu))
    (first, cpu), (again, _) = times
    print(json.dumps({"seconds": first, "cpu": cpu, "again": again, "peak_mb": _peak_mb(), "before_mb": before}))


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


def _trained(layers: int, r: int) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in (ATTENTION | MLP).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.default.weight"] = torch.randn(r, columns, generator=draw)
            tensors[f"{key}.lora_B.default.weight"] = torch.randn(rows, r, generator=draw)
    return tensors


def _write_deepspeed(scratch: Path, trained: dict[str, Any], layers: int) -> tuple[Path, int]:
    """The Trainer's folder around DeepSpeed's; the frozen base is in the model file, as older DeepSpeed wrote it."""
    import torch

    folder = scratch / f"checkpoint-{STEP}" / f"global_step{STEP}"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    frozen = {
        f"base_model.model.model.layers.{layer}.{name}.base_layer.weight": torch.ones(shape, dtype=torch.bfloat16)
        for layer in range(layers)
        for name, shape in (ATTENTION | MLP).items()
    }
    model = {
        "module": {**frozen, **{name: tensor.bfloat16() for name, tensor in trained.items()}},
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in trained.items()}],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
        "shared_params": {},
        "global_steps": STEP,
        "skipped_steps": 0,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    del model, frozen
    flat = torch.cat([tensor.reshape(-1) for tensor in trained.values()])
    for rank, part in enumerate(flat.chunk(RANKS)):
        moments = {"step": torch.tensor(float(STEP)), "exp_avg": torch.zeros_like(part), "exp_avg_sq": part.square()}
        state = {
            "zero_stage": 2,
            "partition_count": [RANKS],
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"lr": 1e-4}]},
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)
    return folder.parent, flat.nbytes * 3 // 2  # the masters and their 16-bit copies


def _write_xtuner(scratch: Path, trained: dict[str, Any], layers: int) -> tuple[Path, int]:
    import torch

    assert layers, "the base is not in XTuner's file"
    state = {f"llm.{name}": tensor for name, tensor in trained.items()}
    moments = {i: {"exp_avg": torch.zeros_like(t), "exp_avg_sq": t.square()} for i, t in enumerate(state.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    torch.save({"meta": {"iter": STEP}, "state_dict": state, "optimizer": optimizer}, scratch / f"iter_{STEP}.pth")
    return scratch / f"iter_{STEP}.pth", sum(tensor.nbytes for tensor in state.values())


def _write_base(folder: Path, layers: int) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=16
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
