"""Real training runs at toy size, for the tests of train: a run's section, its start, its losses and its weights."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft_core.convert.zero_files import rank_files, read_rank_state
from sft_core.pack import pack_dataset
from sft_core.recipe import LoraConfig, PackConfig, TrainConfig
from sft_core.train import TrainInputs, copy_result, train_adapter
from sft_core.train.checkpoints import newest_complete
from sft_core.train.launchers import ONE_MACHINE, Launch, training_environment
from sft_core.train.metrics import read_metrics
from sft_core.train.ranks import Heart
from sft_core.train.spec import TrainSpec
from sft_core.train.worker import run

TOGETHER = 800.0
"""Seconds for the trainings of one `train_together`; they take some 20."""
PLAIN = TrainConfig(
    quantization="none",
    lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0),
    dtype="float32",
    deepspeed=None,
    num_train_epochs=2,
    max_steps=5,
    gradient_accumulation_steps=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    warmup_ratio=0.4,
    gradient_checkpointing=False,
    logging_steps=1,
)
"""float32 without dropout, so that whatever computes the same gives the same."""


def config(**changes: Any) -> TrainConfig:
    """PLAIN with other values; `lora` too is changed key by key."""
    section = PLAIN.model_dump()
    if isinstance(changes.get("lora"), dict):
        changes["lora"] = {**section["lora"], **changes["lora"]}
    return TrainConfig.model_validate({**section, **changes})


def make_packed(folder: Path, model: Path, write_conversations: Callable[..., Path], packing: str = "best_fit") -> Path:
    """40 short conversations below `folder/conversations`, packed to rows of 128 tokens."""
    conversations = write_conversations(folder / "conversations", 40, 4)
    pack = PackConfig(max_length=128, chat_template="chatml", packing=packing)
    pack_dataset(conversations, model, pack, 42, folder / "packed")
    return folder / "packed"


def train(
    packed: Path,
    model: Path,
    folder: Path,
    section: TrainConfig,
    on_line: Callable[[str], None] = lambda _: None,
    launch: Launch = ONE_MACHINE,
) -> Path:
    """Run, or go on with, a training below `folder`; the folder of its artifact. A new one for each that ends."""
    inputs = TrainInputs(
        packed=packed,
        base_model=model,
        trust_remote_code=False,
        work=folder / "work",
        conversations=packed.parent / "conversations",
        launch=launch,
    )
    train_adapter(inputs, section, 7, folder / "out", on_line)
    return folder / "out"


def train_here(packed: Path, model: Path, folder: Path, section: TrainConfig) -> Path:
    """What one rank does between its start and its end, in this process: where no start, signal or DeepSpeed is at
    stake, several seconds of imports are saved. The folder of what would be the artifact."""
    assert status_here(packed, model, folder, section) == 0
    return taken(folder)


def status_here(packed: Path, model: Path, folder: Path, section: TrainConfig) -> int:
    """The same, without a result: the rank's exit status."""
    assert section.deepspeed is None
    stop, spec = signal.getsignal(signal.SIGTERM), spec_below(folder, packed, model, section)
    heart = Heart(folder / "work" / "ranks", "0", 600)
    try:
        return run(spec, heart, 600)
    finally:
        heart.end()
        signal.signal(signal.SIGTERM, stop)


def train_together(packed: Path, model: Path, folder: Path, sections: dict[str, TrainConfig]) -> dict[str, Path]:
    """Several trainings, as `run_together` does them."""
    return run_together(folder, {name: (packed, model, section) for name, section in sections.items()})


def run_together(folder: Path, runs: dict[str, tuple[Path, Path, TrainConfig]]) -> dict[str, Path]:
    """Trainings (packed rows, model, section) of as many ranks each, one after the other in the same ranks
    (many_runs.py), below `folder/NAME`; their folders of what would be the artifacts. Those under ZeRO-3 come last: it
    changes torch."""
    sections = {name: section for name, (_, _, section) in runs.items()}
    (ranks,) = {section.num_processes or 1 for section in sections.values()}
    specs = []
    for name in sorted(runs, key=lambda name: "zero3" in (sections[name].deepspeed or "")):
        spec_below(folder / name, *runs[name]).write(folder / name / "work" / "spec.json")
        specs.append(str(folder / name / "work" / "spec.json"))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "tests.sft_core.many_runs", *specs]
    environment = training_environment(os.environ, ranks)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TOGETHER, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {name: taken(folder / name) for name in sections}
    for name, section in sections.items():
        assert stage_seen(found[name] / "checkpoint") == (section.deepspeed or "").replace("deepspeed_", "")[:5], name
    return found


def stage_seen(checkpoint: Path) -> str:
    """`zero3`, whose ranks hold parts of the model; `zero2` or `zero1`; nothing without DeepSpeed."""
    folders = list(checkpoint.glob("global_step*"))
    return f"zero{read_rank_state(rank_files(folders[0])[0]).stage}" if folders else ""


def spec_below(folder: Path, packed: Path, model: Path, section: TrainConfig) -> TrainSpec:
    """Of a training whose work is done below `folder`."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    return TrainSpec(
        packed=str(packed),
        base_model=str(model),
        trust_remote_code=False,
        train=section.model_dump(mode="json"),
        seed=7,
        checkpoints=str(work),
        metrics=str(work / "metrics.jsonl"),
        conversations=str(packed.parent / "conversations"),
    )


def taken(folder: Path) -> Path:
    """The folder of what would be the artifact."""
    checkpoint = newest_complete(folder / "work")
    assert checkpoint is not None
    shutil.rmtree(folder / "out", ignore_errors=True)
    copy_result(checkpoint, folder / "work", folder / "out")
    return folder / "out"


def losses(out: Path) -> list[float]:
    """Of every optimizer step, in order."""
    metrics = read_metrics(out / "metrics.jsonl")
    assert [entry["optimizer_step"] for entry in metrics] == list(range(1, metrics[-1]["max_steps"] + 1))
    return [entry["loss"] for entry in metrics]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's trained tensors: the adapter's, or all of the model's."""
    return load_file(weights_file(out))


def weights_file(out: Path) -> Path:
    """`adapter_model.safetensors`, or `model.safetensors` where all weights are trained."""
    adapter = out / "checkpoint" / "adapter_model.safetensors"
    return adapter if adapter.exists() else out / "checkpoint" / "model.safetensors"


def weights_hash(out: Path) -> str:
    """SHA-256 of `weights_file`."""
    return hashlib.sha256(weights_file(out).read_bytes()).hexdigest()


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """All losses and all weights, within `tolerance`."""
    for step, (one, other) in enumerate(zip(losses(found), losses(expected), strict=True), start=1):
        assert abs(one - other) <= tolerance, f"step {step}: {one} and {other}"
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}")


def child_of(parent: int, timeout: float = 240.0) -> int:
    """Pid of the training process that `parent` started."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for thread in Path(f"/proc/{parent}/task").iterdir():
            for pid in (thread / "children").read_text().split():
                if b"sft_core.train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        time.sleep(0.05)
    raise AssertionError("no training process")
