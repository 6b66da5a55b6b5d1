"""The files of a DeepSpeed folder, each field of the type that DeepSpeed writes; they may be anybody's.

In: `*_model_states.pt` and `*_optim_states.pt`. Out: ModelStates, RankState. ModelError names the file and the field.
Source: deepspeed's `engine.py` and `stage_1_and_2.py`, `stage3.py`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.names import MAX_DIMENSIONS
from sft_core.convert.reader import read_pickle
from sft_core.errors import ModelError

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
REQUIRED: Any = object()
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStates:
    """`module`: 16-bit copies, buffers, frozen weights. `groups`: trained parameters in the order of the flat vectors.
    `shared`: second name of a tied weight -> first.
    """

    module: dict[str, torch.Tensor]
    groups: list[Shapes]
    shared: dict[str, str]
    untrained: tuple[str, ...]
    global_steps: int | None
    counts_skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """One rank's fp32 vectors, one a parameter group; `step`: of its optimizer, None if it does not say."""

    path: Path
    stage: int
    ranks: int
    vectors: list[torch.Tensor]
    paddings: list[list[int]] | None
    step: float | None


def rank_files(folder: Path) -> list[Path]:
    """Files of optimizer state, by rank."""
    return sorted((path for path in folder.iterdir() if RANK_FILE.fullmatch(path.name)), key=rank_of)


def rank_of(path: Path) -> int:
    """ModelError for a model-parallel checkpoint."""
    match = RANK_FILE.fullmatch(path.name)
    assert match is not None, "only files of this pattern come here"
    if int(match[2]):
        raise ModelError(f"{path}: a model-parallel checkpoint; only data-parallel ones are read")
    return int(match[1])


def read_model_states(path: Path) -> ModelStates:
    """ModelError if the file is torn, or a field is not what DeepSpeed writes."""
    data = read_pickle(path)
    shapes = _field(data, "param_shapes", path, lambda value: _is_shapes(value) or _is_list(value, _is_shapes))
    groups = shapes if isinstance(shapes, list) else [shapes]
    module = _field(data, "module", path, lambda value: isinstance(value, dict), {})
    shared = _field(data, "shared_params", path, _is_names, {})
    frozen = _field(data, "frozen_param_shapes", path, lambda value: isinstance(value, dict), {})
    buffers = _field(data, "buffer_names", path, lambda value: isinstance(value, list), [])
    return ModelStates(
        module={str(name): tensor for name, tensor in module.items() if isinstance(tensor, torch.Tensor)},
        groups=[{str(name): tuple(shape) for name, shape in group.items()} for group in groups],
        shared=shared,
        untrained=tuple(name for name in (*buffers, *frozen) if isinstance(name, str)),
        global_steps=steps if _is_count(steps := data.get("global_steps")) else None,
        counts_skipped=_is_count(data.get("skipped_steps")),
    )


def read_rank_state(path: Path) -> RankState:
    """ModelError if the file is torn, or a field is not what DeepSpeed writes."""
    data = read_pickle(path)
    state: dict[str, Any] = _field(data, "optimizer_state_dict", path, lambda value: isinstance(value, dict))
    counts = _field(state, "partition_count", path, lambda value: _is_count(value) or _is_list(value, _is_count))
    # DeepSpeed's BF16_Optimizer is of stage 1 and does not say so
    stage = _field(state, "zero_stage", path, lambda value: _is_count(value) and 1 <= value <= 3, 1)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    vectors = _field(state, key, path, lambda value: _is_list(value, _is_fp32))
    gaps = _field(
        state,
        "param_alignment_paddings",
        path,
        lambda value: isinstance(value, list) and all(_is_list(group, _is_count) for group in value),
        None,
    )
    return RankState(
        path=path,
        stage=stage,
        ranks=max(counts) if isinstance(counts, list) else counts,
        vectors=[vector.detach().reshape(-1) for vector in vectors],
        paddings=gaps or None,
        step=_optimizer_step(state),
    )


def _field(data: dict[str, Any], key: str, path: Path, fits: Callable[[Any], bool], absent: Any = REQUIRED) -> Any:
    """The value, or `absent` where the file has none. ModelError if it is of another type than DeepSpeed's."""
    value = data.get(key)
    if value is None and absent is not REQUIRED:
        return absent
    if not fits(value):
        raise ModelError(f"{path}: {key!r} is missing, or not what DeepSpeed writes; not a ZeRO checkpoint, or torn")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    """True for a list that is not empty, of things that all fit."""
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, (tuple, list)) and len(shape) <= MAX_DIMENSIONS and all(map(_is_count, shape))
        for shape in value.values()
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for pair in value.items() for name in pair)


def _is_fp32(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _optimizer_step(state: dict[str, Any]) -> float | None:
    bases = [state.get(key) for key in ("base_optimizer_state", "optimizer_state_dict")]
    base = next((found for found in bases if isinstance(found, dict) and found), {})
    inner = base.get("state")
    groups = list(inner.values()) if isinstance(inner, dict) else []
    step: Any = next((group["step"] for group in groups if isinstance(group, dict) and "step" in group), None)
    if isinstance(step, torch.Tensor):
        return float(step) if step.numel() == 1 else None
    return float(step) if isinstance(step, float) or _is_count(step) else None
