"""DeepSpeed ZeRO folders to whole fp32 tensors. Source: deepspeed's `stage_1_and_2.py`, `stage3.py`.

In: one folder with a model_states file and one optim_states file a rank. Out: the fp32 master weights by parameter
name, each read when it is asked for. ZeRO-1/2: each rank holds a slice of every parameter group's flat vector. ZeRO-3:
each rank holds ceil(numel / ranks) elements of every parameter, the last ones padding.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from sft_core.convert.trained import Stored, TrainedTensors, all_finite, same_bits, stored
from sft_core.convert.zero_files import (
    MODEL_FILES,
    ModelStates,
    RankState,
    Shapes,
    rank_files,
    rank_of,
    read_model_states,
    read_rank_state,
)
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

MAX_RANKS = 100_000
"""More are not listed as missing."""


def is_zero_folder(folder: Path) -> bool:
    """True if DeepSpeed's files are in `folder` itself."""
    return any((folder / name).is_file() for name in MODEL_FILES) or bool(rank_files(folder))


def read_zero(folder: Path, lora: LoraConfig | None) -> TrainedTensors:
    """The fp32 master weights; without `lora` also frozen weights and buffers.

    ModelError for a missing rank, a rank of another step, sizes that do not add up.
    """
    model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if model_file is None:
        raise ModelError(f"{folder}: no {MODEL_FILES[0]}; the checkpoint is incomplete, take another one")
    model = read_model_states(model_file)
    files = rank_files(folder)
    if not files:
        raise ModelError(
            f"{folder}: no *_optim_states.pt: the ranks' fp32 weights are missing, copy them there as well"
        )
    states = [read_rank_state(path) for path in files]
    stage, ranks = states[0].stage, states[0].ranks
    if len(files) != ranks or {rank_of(path) for path in files} != set(range(len(files))):
        missing = sorted(set(range(min(ranks, MAX_RANKS))) - {rank_of(path) for path in files})[:8]
        raise ModelError(f"{folder}: written by {ranks} ranks, {len(files)} files found; missing ranks {missing}")
    _check_steps(states, model)
    flat = [state.vectors for state in states]
    if stage == 3:
        cuts = _join_partitions([_one_vector(vectors) for vectors in flat], model.groups, folder)
    else:
        cuts = _cut_groups(flat, model.groups, states[0].paddings, folder)
    tensors = {name: _master(name, shape, parts, model.module, folder) for name, shape, parts in cuts}
    if lora is None:
        tensors |= {name: stored(model.module[name]) for name in model.untrained if name in model.module}
    for second, first in model.shared.items():  # tied weights, stored once
        if first in tensors:
            tensors[second] = tensors[first]
    return TrainedTensors(
        tensors=tensors, layout=f"deepspeed-zero{stage}", ranks=ranks, global_steps=model.global_steps, source=folder
    )


def _master(
    name: str, shape: tuple[int, ...], parts: dict[int, torch.Tensor], copies: dict[str, torch.Tensor], folder: Path
) -> Stored:
    """The parameter, joined when read. Its 16-bit copy, which rank 0 wrote beside it, must be the master rounded."""

    def read() -> torch.Tensor:
        vector = torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
        tensor = vector[: math.prod(shape)].view(shape)
        copy = copies.get(name)
        if copy is not None and copy.shape == shape and not _is_rounded(tensor, copy):
            raise ModelError(
                f"{folder}: the fp32 weights of {name} (rank files {sorted(parts)}) are not those that the 16-bit "
                "copy in the model_states file was made of: a file is of another step; copy the checkpoint again"
            )
        return tensor

    return Stored(shape, torch.float32, read)


def _is_rounded(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    """True if the copy is the tensor rounded; what is not finite is refused elsewhere."""
    rounded = tensor.to(copy.dtype)
    return same_bits(rounded, copy) or torch.equal(rounded, copy) or not all_finite(tensor)


def _check_steps(states: list[RankState], model: ModelStates) -> None:
    """Every rank must be of one stage and number of ranks, and its optimizer must have taken the same number of steps,
    no more than the engine counted.
    """
    first, folder = states[0], states[0].path.parent
    for state in states:
        if (state.stage, state.ranks) != (first.stage, first.ranks):
            raise ModelError(
                f"{folder}: {state.path.name} is of stage {state.stage} on {state.ranks} ranks, {first.path.name} of "
                f"stage {first.stage} on {first.ranks}; the files are of different checkpoints, copy them again"
            )
    counted = [state for state in states if state.step]
    for state in counted:
        if state.step != counted[0].step:
            raise ModelError(
                f"{folder}: {state.path.name} is of optimizer step {state.step:g}, {counted[0].path.name} of "
                f"{counted[0].step:g}; the files are of different checkpoints, copy them again"
            )
    total = model.global_steps
    step = counted[0].step if counted else None
    if step and total is not None and model.counts_skipped and step > total:
        raise ModelError(
            f"{folder}: the ranks are of optimizer step {step:g}, the model_states file of step {total}; "
            "the files are of different checkpoints, copy them again"
        )


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
    if paddings and [len(gaps) for gaps in paddings] != [len(shapes) for shapes in groups]:
        raise ModelError(f"{folder}: param_alignment_paddings is of other parameters than param_shapes; torn")
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
        each = -(-math.prod(shape) // len(flat))
        _require(all(offset + each <= len(vector) for vector in flat), name, shape, folder)
        yield name, shape, {rank: vector[offset : offset + each] for rank, vector in enumerate(flat)}
        offset += each
    if any(len(vector) != offset for vector in flat):
        raise ModelError(
            f"{folder}: the ranks hold {[len(v) for v in flat]} fp32 elements, {offset} are expected of each"
        )


def _require(inside: bool, name: str, shape: tuple[int, ...], folder: Path) -> None:
    if not inside:
        raise ModelError(f"{folder}: the fp32 weights end before {name} {shape}; a rank's file is incomplete")
