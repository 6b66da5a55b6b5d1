"""How quick is training on a CPU? Run by hand: `python benchmarks/train_cpu.py --trl-python PYTHON --file ALPACA.json`.

In: alpaca rows (made here from a seed without `--file`), a Llama of about 5 million random parameters, LoRA r=8 on all
linear layers, float32, one thread. Out: ratios of `train_adapter` (its real child process) over TRL's SFTTrainer on the
same sequences, taken by turns in one run, by the wall and by CPU time, which hears less of a machine's other users:

    packed    optimizer steps a second; both pack best-fit to the same length, same rows a step
    unpacked  tokens, and supervised tokens, a second; ours packed, TRL with one row a sequence and padding, as many
              rows a step as fill ours on average (the share of supervised tokens varies with the rows that come first)

Both trainers log every step. Warm-up steps are left out; so are preparing, loading and saving.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3


def main() -> None:
    """Take the figures and print them, a line a run and a table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--file", type=Path, help="a JSON list of alpaca rows; made ones without it")
    parser.add_argument("--rows", type=int, default=900, help="conversations")
    parser.add_argument("--steps", type=int, default=15, help=f"optimizer steps a run, {WARM_UP} of them warm-up")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--deepspeed", nargs="+", default=["null", "zero2"], help="our presets")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="sft-train-") as name:
        folder = Path(name)
        model = make_model(folder, options.hidden)
        packed = pack_rows(folder, model, options)
        ratios: dict[str, list[tuple[float, float]]] = {}
        for turn in range(options.repeat):
            peers = {kind: run_trl(folder, packed, options, kind) for kind in ("packed", "unpacked")}
            for preset in options.deepspeed:
                ours = run_ours(folder / f"ours-{turn}-{preset}", packed, options, preset)
                show(f"ours, deepspeed {preset}", ours)
                for kind, unit in (("packed", "steps"), ("unpacked", "tokens"), ("unpacked", "supervised")):
                    pair = tuple(speed(ours, unit, clock) / speed(peers[kind], unit, clock) for clock in CLOCKS)
                    ratios.setdefault(f"{unit:10} over TRL {kind:9} deepspeed {preset:6}", []).append(pair)
        for what, pairs in ratios.items():
            wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            each = ", ".join(f"{a:.2f}" for a, _ in pairs)
            print(f"{what} {wall:.2f} by the wall ({each}), {cpu:.2f} by CPU time")


CLOCKS = ("seconds", "cpu_seconds")


def speed(result: dict[str, Any], unit: str, clock: str) -> float:
    """Units a second."""
    return result[unit] / result[clock]


def show(who: str, result: dict[str, Any]) -> None:
    """One run."""
    rates = (f"{speed(result, unit, 'seconds'):,.2f} {unit}/s" for unit in ("steps", "tokens", "supervised"))
    print(f"  {who:22} {'  '.join(rates)}  first loss {result['loss']:.4f}", flush=True)


def make_model(folder: Path, hidden: int) -> Path:
    """A random Llama beside a tokenizer of 6400 tokens."""
    import torch
    from prepare import MINIMIND, trained_tokenizer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MINIMIND if MINIMIND.is_dir() else trained_tokenizer(folder / "tok"))
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 32 * 32, "num_hidden_layers": 4}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **special))
    model.save_pretrained(folder / "model")
    print(f"model: {model.num_parameters() / 1e6:.1f} million parameters")
    return folder / "model"


def pack_rows(folder: Path, model: Path, options: argparse.Namespace) -> Path:
    """Our pack step; TRL gets its sequences."""
    from prepare import write_conversations

    from sft_core.pack import load_packed, pack_dataset
    from sft_core.recipe import PackConfig

    conversations = write_conversations(folder / "rows", options.rows, options.file)
    config = PackConfig(max_length=options.max_length, chat_template="chatml")
    pack_dataset(conversations, model, config, 42, folder / "packed")
    packed = load_packed(folder / "packed")
    mean = packed.lengths.mean()
    print(
        f"data: {len(packed)} sequences of {mean:.0f} tokens (longest {packed.lengths.max()}), rows {config.max_length}"
    )
    return folder / "packed"


def run_trl(folder: Path, packed: Path, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """TRL in a process of its own: a packed row a step, or as many sequences as fill it on average."""
    from sft_core.pack import load_packed

    per_row = max(1, round(options.max_length / float(load_packed(packed).lengths.mean())))
    settings = {
        "model": str(folder / "model"),
        "sequences": str(packed / "sequences"),
        "out": str(folder / f"trl-{kind}"),
        "packing": kind == "packed",
        "batch": 1 if kind == "packed" else per_row,
        "max_length": options.max_length,
        "steps": options.steps,
        "warm_up": WARM_UP,
    }
    script = Path(__file__).with_name("train_cpu_trl.py")
    command = [options.trl_python, str(script), json.dumps(settings)]
    child = subprocess.run(command, check=False, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"TRL failed: {child.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    show(f"TRL {result['version']} {kind}", result)
    return result


def run_ours(folder: Path, packed: Path, options: argparse.Namespace, preset: str) -> dict[str, Any]:
    """`train_adapter` with its child process; figures from metrics.jsonl, CPU time from /proc as lines arrive."""
    from sft_core.recipe import LoraConfig, TrainConfig
    from sft_core.train import TrainInputs, train_adapter
    from sft_core.train.metrics import read_metrics

    config = TrainConfig(
        quantization="none",
        lora=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0),
        deepspeed=None if preset == "null" else preset,
        dtype="float32",
        max_steps=options.steps,
        num_train_epochs=20,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=10_000,
        num_processes=1,
    )
    cpu: dict[int, float] = {}

    def on_line(line: str) -> None:
        if line.startswith("step "):
            cpu[int(line.split()[1].split("/")[0])] = child_cpu_seconds()

    inputs = TrainInputs(
        packed=packed, base_model=packed.parent / "model", trust_remote_code=False, work=folder / "work"
    )
    train_adapter(inputs, config, 7, folder / "out", on_line)
    metrics = read_metrics(folder / "work" / "metrics.jsonl")
    first, last = metrics[WARM_UP - 1], metrics[-1]
    return {
        "seconds": (last["time"] - first["time"]) / 1000,
        "cpu_seconds": cpu[last["optimizer_step"]] - cpu[first["optimizer_step"]],
        "steps": last["optimizer_step"] - first["optimizer_step"],
        "tokens": last["tokens"] - first["tokens"],
        "supervised": last["supervised_tokens"] - first["supervised_tokens"],
        "loss": metrics[0]["loss"],
    }


def child_cpu_seconds() -> float:
    """CPU time of this process's training child so far."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"sft_core.train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError("no training child")


if __name__ == "__main__":
    main()
