"""Real training runs at toy size, for the tests of train: a run's section, its start, its losses and its weights."""

import hashlib
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft_core.pack import pack_dataset
from sft_core.recipe import LoraConfig, PackConfig, TrainConfig
from sft_core.train import TrainInputs, copy_result, train_adapter
from sft_core.train.checkpoints import newest_complete
from sft_core.train.launchers import ONE_MACHINE, Launch
from sft_core.train.metrics import read_metrics
from sft_core.train.ranks import Heart
from sft_core.train.spec import TrainSpec
from sft_core.train.worker import run

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
    checkpoint = newest_complete(folder / "work")
    assert checkpoint is not None
    shutil.rmtree(folder / "out", ignore_errors=True)
    copy_result(checkpoint, folder / "work", folder / "out")
    return folder / "out"


def status_here(packed: Path, model: Path, folder: Path, section: TrainConfig) -> int:
    """The same, without a result: the rank's exit status."""
    assert section.deepspeed is None
    work, stop = folder / "work", signal.getsignal(signal.SIGTERM)
    work.mkdir(parents=True, exist_ok=True)
    spec = TrainSpec(
        packed=str(packed),
        base_model=str(model),
        trust_remote_code=False,
        train=section.model_dump(mode="json"),
        seed=7,
        checkpoints=str(work),
        metrics=str(work / "metrics.jsonl"),
        conversations=str(packed.parent / "conversations"),
    )
    heart = Heart(work / "ranks", "0", 600)
    try:
        return run(spec, heart, 600)
    finally:
        heart.end()
        signal.signal(signal.SIGTERM, stop)


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
