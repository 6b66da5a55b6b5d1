"""Which kind of checkpoint a path is, and its adapter tensors.

In: a file or folder as a trainer left it (or a folder that holds such ones: the newest counts). Out: TrainedTensors.
Where DeepSpeed's state and `adapter_model.safetensors` are both there, the state counts: its weights are the fp32
masters, the others a 16-bit copy.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft_core.convert.reader import read_pickle
from sft_core.convert.trained import Stored, TrainedTensors, stored
from sft_core.convert.writer import DTYPES
from sft_core.convert.zero import is_zero_folder, read_zero
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INITIAL = "initial_adapter.safetensors"
"""In a checkpoint: the A and B that training began with, where they are not zero together (PiSSA)."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = re.compile(r"(?:checkpoint-|iter_|epoch_)(\d+)(?:\.pth)?")


def read_checkpoint(checkpoint: Path, lora: LoraConfig | None) -> TrainedTensors:
    """The tensors of any layout; `lora` is None for fully trained weights. ModelError if the path is none, or was
    trained with another rank or alpha.
    """
    if checkpoint.is_file():
        return _read_single_file(checkpoint)
    if not checkpoint.is_dir():
        raise ModelError(f"checkpoint {checkpoint}: no such file or folder")
    if is_zero_folder(checkpoint):
        return read_zero(checkpoint, lora)
    if (checkpoint / "latest").is_file():
        _check_config(checkpoint / CONFIG, lora)
        return read_zero(_tagged_folder(checkpoint), lora)
    if lora is not None and (checkpoint / WEIGHTS).is_file():
        _check_config(checkpoint / CONFIG, lora)
        return _read_plain(checkpoint, (WEIGHTS,))
    if lora is None and (files := _full_files(checkpoint)):
        return _read_plain(checkpoint, files)
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
        raise ModelError(f"{path}: has no state_dict; it holds {str(sorted(map(str, data)))[:300]}")
    steps = meta.get("iter") if isinstance(meta, dict) else None
    wrong = [str(name)[:80] for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if wrong:
        raise ModelError(f"{path}: state_dict holds {wrong[0]}, which is no tensor")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:  # tied weights may be there twice
        raise ModelError(f"{path}: state_dict shows the same numbers many times over, and would grow when written")
    return TrainedTensors(
        tensors={str(name): stored(tensor) for name, tensor in tensors.items()},
        layout="xtuner-pth",
        ranks=1,
        global_steps=steps if isinstance(steps, int) else None,
        source=path,
    )


def _read_plain(folder: Path, files: tuple[str, ...]) -> TrainedTensors:
    """Trainer without DeepSpeed: its safetensors files are the truth."""
    tensors: dict[str, Stored] = {}
    for name in files:
        try:
            tensors.update(stored_in(folder / name))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / name}: missing, torn or no safetensors file ({error}); take another checkpoint"
            ) from None
    state = folder / "trainer_state.json"
    steps = _read_json(state).get("global_step") if state.is_file() else None
    return TrainedTensors(tensors=tensors, layout="trainer", ranks=1, global_steps=steps, source=folder)


def stored_in(path: Path) -> dict[str, Stored]:
    """Tensors of one safetensors file, by name."""
    file: Any = safe_open(path, framework="pt")  # stays open as long as its tensors are wanted
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return {
        name: Stored(tuple(part.get_shape()), DTYPES[part.get_dtype()], partial(file.get_tensor, name))
        for name, part in slices.items()
    }


def _full_files(folder: Path) -> tuple[str, ...]:
    """The weight files of a whole model, by its index where there is one."""
    if (folder / INDEX).is_file():
        return tuple(sorted(set(_read_json(folder / INDEX)["weight_map"].values())))
    return (SINGLE,) if (folder / SINGLE).is_file() else ()


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


def _check_config(path: Path, lora: LoraConfig | None) -> None:
    """The checkpoint's own adapter configuration, where there is one, must be the one asked for."""
    if lora is None or not path.is_file():
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
