"""DeepSpeed ZeRO folders to whole fp32 tensors. Source: deepspeed's `stage_1_and_2.py`, `stage3.py`.

In: one folder with a model_states file and one optim_states file a rank. Out: the fp32 master weights by parameter
name, each read when it is asked for. ZeRO-1/2: each rank holds a slice of every parameter group's flat vector. ZeRO-3:
each rank holds ceil(numel / ranks) elements of every parameter, the last ones padding.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.reader import read_pickle
from sft_core.convert.trained import Stored, TrainedTensors, all_finite, stored
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
Shapes = dict[str, tuple[int, ...]]


def is_zero_folder(folder: Path) -> bool:
    """True if DeepSpeed's files are in `folder` itself."""
    return any((folder / name).is_file() for name in MODEL_FILES) or bool(_rank_files(folder))


def read_zero(folder: Path, lora: LoraConfig | None) -> TrainedTensors:
    """The fp32 master weights; without `lora` also frozen weights and buffers.

    ModelError for a missing rank, a rank of another step, sizes that do not add up.
    """
    model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if model_file is None:
        raise ModelError(f"{folder}: no {MODEL_FILES[0]}; the checkpoint is incomplete, take another one")
    model = read_pickle(model_file)
    files = _rank_files(folder)
    if not files:
        raise ModelError(
            f"{folder}: no *_optim_states.pt: the ranks' fp32 weights are missing, copy them there as well"
        )
    states = [_field(read_pickle(path), "optimizer_state_dict", path) for path in files]
    stage, ranks = _stage_and_ranks(states[0], files[0])
    if len(files) != ranks:
        missing = sorted(set(range(ranks)) - {_rank(path) for path in files})
        raise ModelError(f"{folder}: written by {ranks} ranks, {len(files)} files found; missing ranks {missing}")
    _check_steps(states, files, model)
    shapes = _field(model, "param_shapes", model_file)
    groups: list[Shapes] = shapes if isinstance(shapes, list) else [shapes]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [_flat_groups(state, key, path) for state, path in zip(states, files, strict=True)]
    if stage == 3:
        cuts = _join_partitions([_one_vector(vectors) for vectors in flat], groups, folder)
    else:
        cuts = _cut_groups(flat, groups, states[0].get("param_alignment_paddings"), folder)
    copies = model.get("module") or {}
    steps = model.get("global_steps")
    tensors = {name: _master(name, shape, parts, copies, folder) for name, shape, parts in cuts}
    if lora is None:
        tensors |= _others(model)
    for second, first in (model.get("shared_params") or {}).items():  # tied weights, stored once
        if first in tensors:
            tensors[second] = tensors[first]
    return TrainedTensors(
        tensors=tensors,
        layout=f"deepspeed-zero{stage}",
        ranks=ranks,
        global_steps=steps if isinstance(steps, int) else None,
        source=folder,
    )


def _master(name: str, shape: Any, parts: dict[int, torch.Tensor], copies: dict[str, Any], folder: Path) -> Stored:
    """The parameter, joined when read. Its 16-bit copy, which rank 0 wrote beside it, must be the master rounded."""

    def read() -> torch.Tensor:
        vector = torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
        tensor = vector[: math.prod(shape)].view(tuple(shape))
        copy = copies.get(name)
        if isinstance(copy, torch.Tensor) and copy.shape == tensor.shape:
            same = torch.equal(tensor.to(copy.dtype), copy) or not all_finite(tensor)
            if not same:
                raise ModelError(
                    f"{folder}: the fp32 weights of {name} (rank files {sorted(parts)}) are not those that the 16-bit "
                    "copy in the model_states file was made of: a file is of another step; copy the checkpoint again"
                )
        return tensor

    return Stored(tuple(shape), torch.float32, read)


def _others(model: dict[str, Any]) -> dict[str, Stored]:
    """Buffers, and parameters that were frozen, where the trainer saved them too."""
    module = model.get("module") or {}
    names = [*(model.get("buffer_names") or ()), *(model.get("frozen_param_shapes") or ())]
    return {name: stored(module[name]) for name in names if isinstance(module.get(name), torch.Tensor)}


def _check_steps(states: list[dict[str, Any]], files: list[Path], model: dict[str, Any]) -> None:
    """Every rank's optimizer must have taken the same number of steps, no more than the engine counted."""
    counts = {path.name: step for state, path in zip(states, files, strict=True) if (step := _optimizer_step(state))}
    first = next(iter(counts.values()), None)
    for name, step in counts.items():
        if step != first:
            raise ModelError(
                f"{files[0].parent}: {name} is of optimizer step {step:g}, {next(iter(counts))} of {first:g}; the "
                "files are of different checkpoints, copy them again"
            )
    total, skipped = model.get("global_steps"), model.get("skipped_steps")
    if first and isinstance(total, int) and isinstance(skipped, int) and first > total:
        raise ModelError(
            f"{files[0].parent}: the ranks are of optimizer step {first:g}, the model_states file of step {total}; "
            "the files are of different checkpoints, copy them again"
        )


def _optimizer_step(state: dict[str, Any]) -> float | None:
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    base = base.get("state") if isinstance(base, dict) else base
    groups = list(base.values()) if isinstance(base, dict) else []
    step = next((group["step"] for group in groups if isinstance(group, dict) and "step" in group), None)
    return float(step) if isinstance(step, (int, float, torch.Tensor)) else None


def _rank_files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if RANK_FILE.fullmatch(path.name)), key=_rank)


def _rank(path: Path) -> int:
    match = RANK_FILE.fullmatch(path.name)
    assert match is not None, "only files of this pattern come here"
    if int(match[2]):
        raise ModelError(f"{path}: a model-parallel checkpoint; only data-parallel ones are read")
    return int(match[1])


def _field(data: dict[str, Any], key: str, path: Path) -> Any:
    if not data.get(key):
        raise ModelError(f"{path}: has no {key!r}; not a ZeRO checkpoint of a trained model")
    return data[key]


def _stage_and_ranks(state: dict[str, Any], path: Path) -> tuple[int, int]:
    count = _field(state, "partition_count", path)
    stage = state.get("zero_stage", 1)  # DeepSpeed's BF16_Optimizer is of stage 1 and does not say so
    if stage not in (1, 2, 3):
        raise ModelError(f"{path}: zero_stage is {stage!r}; 1, 2 and 3 are read")
    return int(stage), max(count) if isinstance(count, list) else int(count)


def _flat_groups(state: dict[str, Any], key: str, path: Path) -> list[torch.Tensor]:
    groups = _field(state, key, path)
    if not all(isinstance(vector, torch.Tensor) and vector.dtype == torch.float32 for vector in groups):
        raise ModelError(f"{path}: {key} holds something other than fp32 vectors; it cannot be converted without loss")
    return [vector.detach().reshape(-1) for vector in groups]


def _one_vector(vectors: list[torch.Tensor]) -> torch.Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


Cut = tuple[str, tuple[int, ...], dict[int, torch.Tensor]]
"""Name, shape, and what each rank holds of the parameter, flat."""


def _cut_groups(
    flat: list[list[torch.Tensor]], groups: list[Shapes], paddings: list[list[int]] | None, folder: Path
) -> Iterator[Cut]:
    """ZeRO-1/2: the ranks' slices laid end to end are a group's vector, cut in the order of `param_shapes`."""
    if any(len(vectors) != len(groups) for vectors in flat):
        raise ModelError(f"{folder}: {len(groups)} parameter groups, but a rank holds {[len(v) for v in flat]}")
    for index, shapes in enumerate(groups):
        slices = [vectors[index] for vectors in flat]
        total = sum(len(values) for values in slices)
        gaps = paddings[index] if paddings else [0] * len(shapes)
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            numel = math.prod(shape)
            _require(offset + numel <= total, name, shape, folder)
            yield name, shape, _span(slices, offset, offset + numel)
            offset += numel + gap
        if total - offset >= 2 * len(flat):  # DeepSpeed pads a group to a multiple of 2 * ranks
            raise ModelError(f"{folder}: {total - offset} fp32 elements belong to no parameter of group {index}")


def _span(slices: list[torch.Tensor], start: int, end: int) -> dict[int, torch.Tensor]:
    """Elements `start` to `end` of the slices laid end to end, by rank."""
    parts: dict[int, torch.Tensor] = {}
    offset = 0
    for rank, values in enumerate(slices):
        first, last = max(start - offset, 0), min(end - offset, len(values))
        if first < last or (start == end and not parts):
            parts[rank] = values[first:last]
        offset += len(values)
    return parts


def _join_partitions(flat: list[torch.Tensor], groups: list[Shapes], folder: Path) -> Iterator[Cut]:
    """ZeRO-3: each parameter's partitions, the last one padded."""
    offset = 0
    for name, shape in [entry for shapes in groups for entry in shapes.items()]:
        each = math.ceil(math.prod(shape) / len(flat))
        _require(all(offset + each <= len(vector) for vector in flat), name, shape, folder)
        yield name, shape, {rank: vector[offset : offset + each] for rank, vector in enumerate(flat)}
        offset += each
    if any(len(vector) != offset for vector in flat):
        raise ModelError(
            f"{folder}: the ranks hold {[len(v) for v in flat]} fp32 elements, {offset} are expected of each"
        )


def _require(inside: bool, name: str, shape: tuple[int, ...], folder: Path) -> None:
    if not inside:
        raise ModelError(f"{folder}: the fp32 weights end before {name} {tuple(shape)}; a rank's file is incomplete")
