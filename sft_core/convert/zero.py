"""DeepSpeed ZeRO folders to whole fp32 tensors. Source: deepspeed's `stage_1_and_2.py`, `stage3.py`, its writers.

In: one folder with a model_states file and one optim_states file a rank. Out: the fp32 master weights by parameter
name. ZeRO-1/2: each rank holds a slice of every parameter group's flat vector. ZeRO-3: each rank holds
ceil(numel / ranks) elements of every parameter, the last ones padding.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.reader import read_pickle
from sft_core.errors import ModelError

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTensors:
    """What a checkpoint holds of the adapter, under the trainer's own names."""

    tensors: dict[str, torch.Tensor]
    layout: str
    ranks: int
    global_steps: int | None
    source: Path


def is_zero_folder(folder: Path) -> bool:
    """True if DeepSpeed's files are in `folder` itself."""
    return any((folder / name).is_file() for name in MODEL_FILES) or bool(_rank_files(folder))


def read_zero(folder: Path) -> TrainedTensors:
    """The fp32 master weights. ModelError for a missing rank, or sizes that do not add up."""
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
    shapes = _field(model, "param_shapes", model_file)
    groups: list[Shapes] = shapes if isinstance(shapes, list) else [shapes]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [_flat_groups(state, key, path) for state, path in zip(states, files, strict=True)]
    if stage == 3:
        tensors = _join_partitions([torch.cat(vectors) for vectors in flat], groups, folder)
    else:
        tensors = _cut_groups(flat, groups, states[0].get("param_alignment_paddings"), folder)
    steps = model.get("global_steps")
    steps = steps if isinstance(steps, int) else None
    return TrainedTensors(
        tensors=tensors, layout=f"deepspeed-zero{stage}", ranks=ranks, global_steps=steps, source=folder
    )


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
    stage, count = _field(state, "zero_stage", path), _field(state, "partition_count", path)
    if stage not in (1, 2, 3):
        raise ModelError(f"{path}: zero_stage is {stage!r}; 1, 2 and 3 are read")
    return int(stage), max(count) if isinstance(count, list) else int(count)


def _flat_groups(state: dict[str, Any], key: str, path: Path) -> list[torch.Tensor]:
    groups = _field(state, key, path)
    if not all(isinstance(vector, torch.Tensor) and vector.dtype == torch.float32 for vector in groups):
        raise ModelError(f"{path}: {key} holds something other than fp32 vectors; it cannot be converted without loss")
    return [vector.detach().reshape(-1) for vector in groups]


def _cut_groups(
    flat: list[list[torch.Tensor]], groups: list[Shapes], paddings: list[list[int]] | None, folder: Path
) -> dict[str, torch.Tensor]:
    """ZeRO-1/2: join each group's vector over the ranks and cut it in the order of `param_shapes`."""
    if any(len(vectors) != len(groups) for vectors in flat):
        raise ModelError(f"{folder}: {len(groups)} parameter groups, but a rank holds {[len(v) for v in flat]}")
    tensors = {}
    for index, shapes in enumerate(groups):
        vector = torch.cat([vectors[index] for vectors in flat])
        gaps = paddings[index] if paddings else [0] * len(shapes)
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            numel = math.prod(shape)
            tensors[name] = _view(vector[offset : offset + numel], shape, name, folder)
            offset += numel + gap
        if len(vector) - offset >= 2 * len(flat):  # DeepSpeed pads a group to a multiple of 2 * ranks
            raise ModelError(f"{folder}: {len(vector) - offset} fp32 elements belong to no parameter of group {index}")
    return tensors


def _join_partitions(flat: list[torch.Tensor], groups: list[Shapes], folder: Path) -> dict[str, torch.Tensor]:
    """ZeRO-3: join each parameter's partitions over the ranks and drop the padding."""
    tensors = {}
    offset = 0
    for name, shape in [entry for shapes in groups for entry in shapes.items()]:
        numel = math.prod(shape)
        each = math.ceil(numel / len(flat))
        whole = torch.cat([vector[offset : offset + each] for vector in flat])
        tensors[name] = _view(whole[:numel], shape, name, folder)
        offset += each
    if any(len(vector) != offset for vector in flat):
        raise ModelError(
            f"{folder}: the ranks hold {[len(v) for v in flat]} fp32 elements, {offset} are expected of each"
        )
    return tensors


def _view(values: torch.Tensor, shape: tuple[int, ...], name: str, folder: Path) -> torch.Tensor:
    if values.numel() != math.prod(shape):
        raise ModelError(f"{folder}: the fp32 weights end before {name} {tuple(shape)}; a rank's file is incomplete")
    return values.view(tuple(shape))
