"""Which kind of checkpoint a path is, and its adapter tensors.

In: a file or folder as a trainer left it (or a folder that holds such ones: the newest counts). Out: TrainedTensors.
Where DeepSpeed's state and `adapter_model.safetensors` are both there, the state counts: its weights are the fp32
masters, the others a 16-bit copy.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from sft_core.convert.reader import read_pickle
from sft_core.convert.zero import TrainedTensors, is_zero_folder, read_zero
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NUMBERED = re.compile(r"(?:checkpoint-|iter_|epoch_)(\d+)(?:\.pth)?")


def read_checkpoint(checkpoint: Path, lora: LoraConfig) -> TrainedTensors:
    """The tensors of any layout. ModelError if the path is none, or was trained with another rank or alpha."""
    if checkpoint.is_file():
        return _read_single_file(checkpoint)
    if not checkpoint.is_dir():
        raise ModelError(f"checkpoint {checkpoint}: no such file or folder")
    if is_zero_folder(checkpoint):
        return read_zero(checkpoint)
    if (checkpoint / "latest").is_file():
        _check_config(checkpoint / CONFIG, lora)
        return read_zero(_tagged_folder(checkpoint))
    if (checkpoint / WEIGHTS).is_file():
        _check_config(checkpoint / CONFIG, lora)
        return _read_plain(checkpoint)
    inner = _newest_inside(checkpoint)
    if inner is None:
        raise ModelError(
            f"checkpoint {checkpoint}: neither DeepSpeed's files (`latest`, *_model_states.pt) nor {WEIGHTS} nor a "
            f"checkpoint-N or iter_N.pth in it; it holds {sorted(path.name for path in checkpoint.iterdir())[:8]}"
        )
    return read_checkpoint(inner, lora)


def _read_single_file(path: Path) -> TrainedTensors:
    """XTuner without DeepSpeed: one `.pth` with `state_dict` and `meta`."""
    data = read_pickle(path)
    tensors, meta = data.get("state_dict"), data.get("meta")
    if not isinstance(tensors, dict):
        raise ModelError(f"{path}: has no state_dict; it holds {sorted(map(str, data))[:8]}")
    steps = meta.get("iter") if isinstance(meta, dict) else None
    return TrainedTensors(tensors=tensors, layout="xtuner-pth", ranks=1, global_steps=steps, source=path)


def _read_plain(folder: Path) -> TrainedTensors:
    """Trainer without DeepSpeed: PEFT's own file is the truth."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(
            f"{folder / WEIGHTS}: torn or no safetensors file ({error}); take another checkpoint"
        ) from None
    state = folder / "trainer_state.json"
    steps = _read_json(state).get("global_step") if state.is_file() else None
    return TrainedTensors(tensors=tensors, layout="trainer", ranks=1, global_steps=steps, source=folder)


def _tagged_folder(checkpoint: Path) -> Path:
    tag = (checkpoint / "latest").read_text("utf-8").strip()
    folder = checkpoint / tag
    if not tag or Path(tag).name != tag or not folder.is_dir():
        raise ModelError(
            f"{checkpoint / 'latest'}: names {tag!r}, which is no folder beside it; the checkpoint is torn"
        )
    return folder


def _newest_inside(folder: Path) -> Path | None:
    """The only or the newest checkpoint of a training run's folder; `checkpoint` is what the step train leaves."""
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := NUMBERED.fullmatch(path.name))]
    return max(numbered)[1] if numbered else None


def _check_config(path: Path, lora: LoraConfig) -> None:
    """The checkpoint's own adapter configuration, where there is one, must be the one asked for."""
    if not path.is_file():
        return
    config = _read_json(path)
    for key in ("r", "lora_alpha"):
        if config.get(key) != getattr(lora, key):
            raise ModelError(
                f"{path}: {key} is {config.get(key)}, train.lora.{key} is {getattr(lora, key)}; not one run"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); the checkpoint is torn, take another one") from None
    return value
