"""Does a run that is killed again and again end with the bytes of one that is not? `python benchmarks/kill_resume.py`.

In: made rows of two data sets (one-turn and several turns, weighted), a tiny random Llama, CPU. Out: for each way of
training below the SHA-256 of what an uninterrupted `sft train` left, then the same command killed with SIGKILL at
moments drawn from a seed (half of them from the start of the process on, half after a line of progress), the rank or
`sft train` itself, until the kills are used up; a line a kill, a table last. Exit status 1 if a digest differs.
`--sigterm`: asked to stop instead, and the seconds until it has ended; with `--accumulation 400`, an optimizer step
takes as long as on a real model.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "qlora zero2": {},
    "lora plain": {"quantization": "none", "deepspeed": None},
    "full plain": {"quantization": "none", "deepspeed": None, "lora": None},
    "lora zero3": {"quantization": "none", "deepspeed": "zero3"},
    "qlora zero2, 2 ranks": {"num_processes": 2},
}
LATEST = 1.0
"""Seconds from a line of progress to the kill at most: several optimizer steps and their checkpoints."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Where the run was when it was killed. `torn`: it was writing a checkpoint. `seconds`: until all had ended."""

    whom: str
    step: int
    torn: bool
    seconds: float


def main() -> None:
    """Take the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="of each way of training")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of an optimizer step")
    parser.add_argument("--sigterm", action="store_true", help="ask sft train to stop, rather than kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, table, equal = random.Random(options.seed), [], True
    with tempfile.TemporaryDirectory(prefix="sft-kills-") as name:
        model = make_inputs(Path(name))
        for way in options.ways:
            folder = Path(name) / way.replace(" ", "-")
            recipe = write_recipe(folder, model, WAYS[way], options.steps, options.accumulation)
            clock = time.monotonic()
            expected = ended(recipe, folder / "straight")
            seconds = time.monotonic() - clock
            killed = folder / "killed"
            kills = [kill(recipe, killed, draw, seconds, options.sigterm) for _ in range(options.kills)]
            found = ended(recipe, killed)
            equal = equal and found == expected
            torn, whom = sum(kill.torn for kill in kills), Counter(kill.whom for kill in kills)
            steps = ", ".join(str(kill.step) for kill in kills)
            verdict = "equal" if found == expected else f"DIFFERS: {found}"
            table.append(f"{way:12} {len(kills)} kills ({dict(whom)}, at steps {steps}; {torn} while saving)")
            if options.sigterm:
                times = ", ".join(f"{kill.seconds:.1f}" for kill in kills)
                table.append(f"{'':12} ended after {times} s; a step takes about {seconds / options.steps:.1f} s")
            table.append(f"{'':12} {expected[:16]}... {verdict}")
            print("\n".join(table[-3 if options.sigterm else -2 :]), flush=True)
    print("\n".join(["", *table]))
    sys.exit(0 if equal else 1)


def make_inputs(folder: Path) -> Path:
    """Two files of rows, and a model of half a megabyte."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import make_tiny_model

    draw = random.Random(1)
    short = [{"input": f"say w{i}", "output": f"w{i}!"} for i in range(60)]
    long = [
        {"messages": [message for turn in range(draw.randint(1, 3)) for message in asked(f"{i}.{turn}", draw)]}
        for i in range(40)
    ]
    for name, rows in (("short", short), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return make_tiny_model(folder / "model")


def asked(text: str, draw: random.Random) -> list[dict[str, str]]:
    """A turn of some length."""
    return [{"role": "user", "content": f"q {text}"}, {"role": "assistant", "content": "a" * draw.randint(1, 40)}]


def write_recipe(folder: Path, model: Path, changes: dict[str, Any], steps: int, accumulation: int) -> Path:
    """Packed rows of both files, one of them weighted, so that each epoch draws anew."""
    data = folder.parent
    train = {
        "lora": LORA,
        "dtype": "float32",
        "num_train_epochs": steps * accumulation,
        "max_steps": steps,
        "save_steps": 1,
    }
    train |= {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-2, "logging_steps": 1}
    recipe = {
        "name": "kills",
        "base_model": {"path": str(model)},
        "datasets": [
            {"path": str(data / "short.jsonl"), "map_fn": "default", "weight": 1.5},
            {"path": str(data / "long.jsonl"), "map_fn": "messages", "weight": 0.7},
        ],
        "eval_fraction": 0.1,
        "pack": {"max_length": 128, "chat_template": "chatml", "overlong": "truncate"},
        "train": {**train, "gradient_checkpointing": False, **changes},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder / "recipe.yaml"


def start(recipe: Path, store: Path) -> subprocess.Popen[str]:
    """The command, the same each time."""
    command = [sys.executable, "-m", "cli.main", "train", str(recipe), "--set", f"store={store}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(recipe: Path, store: Path) -> str:
    """SHA-256 of the trained weights of a run that is left in peace."""
    process = start(recipe, store)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {said[-3000:]}")
    checkpoint = Path(said.splitlines()[-1].removeprefix("checkpoint: "))
    adapter = checkpoint / "adapter_model.safetensors"
    weights = adapter if adapter.exists() else checkpoint / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def kill(recipe: Path, store: Path, draw: random.Random, seconds: float, sigterm: bool) -> Kill:
    """Start the command and kill it, or its rank, once. `seconds`: what a whole run takes. `sigterm`: ask it to stop
    after it has said something."""
    whom, by_line = draw.choice(("rank", "sft train")), draw.random() < 0.5
    lines, delay = draw.randint(1, 3), draw.uniform(0, LATEST if by_line else 0.8 * seconds)
    if sigterm:
        whom, by_line, lines, delay = "sft train", True, 1, draw.uniform(0, 0.1 * seconds)
    process = start(recipe, store)
    seen, now = [0], threading.Event()
    reader = threading.Thread(target=read, args=(process, seen, now, lines if by_line else None))
    reader.start()
    if by_line:
        now.wait()
    time.sleep(delay)
    rank = rank_of(process.pid)
    if rank is None:
        whom = "sft train"
    clock = time.monotonic()
    victim = process.pid if whom == "sft train" or rank is None else rank
    os.kill(victim, signal.SIGTERM if sigterm else signal.SIGKILL)
    process.wait()
    reader.join()
    ended_after = time.monotonic() - clock
    time.sleep(0.2)  # until the rank, too, is gone
    newest = max(store.glob("train/*/checkpoints/*/checkpoint-*"), key=lambda p: int(p.name[11:]), default=None)
    done = Kill(whom, seen[0], newest is not None and not (newest / "complete").exists(), ended_after)
    print(f"  killed {done.whom} at step {done.step}{', saving' if done.torn else ''}", flush=True)
    return done


def read(process: subprocess.Popen[str], seen: list[int], now: threading.Event, lines: int | None) -> None:
    """Note the step of each line of progress; `now` is set at line number `lines`."""
    assert process.stdout is not None
    count = 0
    for line in process.stdout:
        if line.startswith("step "):
            seen[0], count = int(line.split()[1].partition("/")[0]), count + 1
        if count == lines:
            now.set()
    now.set()


def rank_of(parent: int) -> int | None:
    """Pid of the training rank below `parent`, if it runs."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in task.read_text().split():
            if b"sft_core.train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


if __name__ == "__main__":
    main()
