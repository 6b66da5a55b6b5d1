"""ZeRO folders made to the description of the format, with what small real runs do not show: three ranks, padding,
DoRA, modules trained whole, a frozen base in the model file.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

PREFIX = "base_model.model."
MODULE = f"{PREFIX}model.layers.0.mlp.up_proj"
LORA = LoraConfig(r=3, lora_alpha=6)
RICH = LoraConfig(r=3, lora_alpha=6, use_dora=True, modules_to_save=("lm_head",))
BASE = f"{MODULE}.base_layer.weight"
RANKS = 3


def adapter(rich: bool) -> dict[str, torch.Tensor]:
    """Under the trainer's names; the sizes are no multiples of anything."""
    torch.manual_seed(0)
    tensors = {
        f"{MODULE}.lora_A.default.weight": torch.randn(3, 7),
        f"{MODULE}.lora_B.default.weight": torch.randn(5, 3),
    }
    if rich:
        tensors[f"{MODULE}.lora_magnitude_vector.default.weight"] = torch.randn(5)
        tensors[f"{PREFIX}lm_head.modules_to_save.default.weight"] = torch.randn(11, 7)
    return tensors


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        f"{MODULE}.lora_A.default.weight": f"{MODULE}.lora_A.weight",
        f"{MODULE}.lora_B.default.weight": f"{MODULE}.lora_B.weight",
        f"{MODULE}.lora_magnitude_vector.default.weight": f"{MODULE}.lora_magnitude_vector",
        f"{PREFIX}lm_head.modules_to_save.default.weight": f"{PREFIX}lm_head.weight",
    }
    return {names[name]: tensor for name, tensor in tensors.items()}


def save_rank(folder: Path, rank: int, **state: Any) -> None:
    moments = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3)}}}
    path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"base_optimizer_state": moments, **state}}, path)


def model_states(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    return {
        "module": {prefix + name: tensor.bfloat16() for name, tensor in tensors.items()},
        "buffer_names": [],
        "param_shapes": [{prefix + name: tensor.shape for name, tensor in tensors.items()}],
        "shared_params": {},
        "global_steps": 4,
        "skipped_steps": 0,
    }


def as_zero2(tensors: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> Path:
    """The flat vector padded to a multiple of 2 * ranks, a slice of it a rank."""
    folder.mkdir()
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    flat = torch.cat([flat, torch.full((-len(flat) % (2 * RANKS),), torch.nan)])
    for rank, part in enumerate(flat.chunk(RANKS)):
        groups = {"single_partition_of_fp32_groups": [part.clone()], "partition_count": [RANKS]}
        save_rank(folder, rank, zero_stage=2, **groups)
    torch.save(model_states(tensors, prefix), folder / "mp_rank_00_model_states.pt")
    return folder


def as_zero3(tensors: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> Path:
    """ceil(numel / ranks) elements of every parameter a rank, the last ones padding."""
    folder.mkdir()
    each = {name: -(-tensor.numel() // RANKS) for name, tensor in tensors.items()}
    for rank in range(RANKS):
        parts = []
        for name, tensor in tensors.items():
            padded = torch.full((each[name] * RANKS,), torch.nan)
            padded[: tensor.numel()] = tensor.reshape(-1)
            parts.append(padded[rank * each[name] : (rank + 1) * each[name]])
        save_rank(folder, rank, zero_stage=3, fp32_flat_groups=[torch.cat(parts)], partition_count=RANKS)
        states = model_states(tensors, prefix)
        states["module"] = {name: torch.empty(0, dtype=torch.bfloat16) for name in states["module"]}
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


Write = Callable[..., Path]


@pytest.mark.parametrize("prefix", ["", "llm."], ids=["trainer", "xtuner"])
@pytest.mark.parametrize("rich", [False, True], ids=["lora", "dora-and-a-whole-head"])
@pytest.mark.parametrize("write", [as_zero2, as_zero3])
def test_masters_are_kept_bit_for_bit(tmp_path: Path, write: Write, rich: bool, prefix: str) -> None:
    tensors = adapter(rich)
    checkpoint = write(tensors, tmp_path / "iter_4.pth", prefix)
    outcome = convert_checkpoint(checkpoint, tmp_path / "out", RICH if rich else LORA, "base")
    got, wanted = load_file(tmp_path / "out" / "adapter_model.safetensors"), expected(tensors)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert (outcome.facts["ranks"], outcome.facts["global_steps"]) == (RANKS, 4)


@pytest.mark.parametrize("write", [as_zero2, as_zero3])
def test_a_rank_that_holds_other_numbers_is_refused(tmp_path: Path, write: Write) -> None:
    tensors = adapter(rich=False)
    checkpoint = write(tensors, tmp_path / "good")
    write({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "other")
    name = f"bf16_zero_pp_rank_{RANKS - 1}_mp_rank_00_optim_states.pt"
    if write is as_zero2:  # ZeRO-3 keeps no copy to hold it against
        (checkpoint / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ModelError, match="a file is of another step"):
            convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")
    (checkpoint / name).unlink()
    with pytest.raises(ModelError, match=r"missing ranks \[2\]"):
        convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")


def test_a_frozen_base_in_the_model_file_is_left_out(tmp_path: Path) -> None:
    tensors = adapter(rich=False)
    checkpoint = as_zero2(tensors, tmp_path / "iter_4.pth")
    states = model_states(tensors, "")
    states["module"][BASE] = torch.ones(5, 7, dtype=torch.bfloat16)
    states["frozen_param_shapes"] = {BASE: torch.Size((5, 7))}
    torch.save(states, checkpoint / "mp_rank_00_model_states.pt")
    convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == expected(tensors).keys()


def test_a_module_trained_whole_must_be_there(tmp_path: Path) -> None:
    checkpoint = as_zero2(adapter(rich=False), tmp_path / "iter_4.pth")
    lora = LoraConfig(r=3, lora_alpha=6, modules_to_save=("lm_head",))
    with pytest.raises(ModelError, match=r"modules_to_save names lm_head, which is not in it"):
        convert_checkpoint(checkpoint, tmp_path / "out", lora, "base", ConvertOptions())


WRONG: dict[str, Any] = {
    "text": "x",
    "below zero": -1,
    "fraction": 1.5,
    "huge": 2**70,
    "empty": [],
    "list": ["x"],
    "dict": {"x": "y"},
    "sizes": {"w": (2**40, 2**40)},
    "tensor": torch.ones(3),
    "16-bit vectors": [torch.ones(3).half()],
}
FIELDS = {
    "mp_rank_00_model_states.pt": ("param_shapes", "module", "shared_params", "buffer_names", "frozen_param_shapes"),
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": (
        "partition_count",
        "zero_stage",
        "single_partition_of_fp32_groups",
        "param_alignment_paddings",
        "base_optimizer_state",
    ),
}
HARMLESS = {"module", "buffer_names", "frozen_param_shapes", "base_optimizer_state", "param_alignment_paddings"}
"""Fields that are of use to a check alone, or to other kinds of checkpoint."""


@pytest.mark.parametrize("file", FIELDS)
def test_a_field_that_deepspeed_never_wrote_is_refused(tmp_path: Path, file: str) -> None:
    path = as_zero2(adapter(rich=False), tmp_path / "iter_4.pth") / file
    whole = torch.load(path)
    taken = set()
    for field in FIELDS[file]:
        for what, value in WRONG.items():
            inner = whole.get("optimizer_state_dict")
            changed = {field: value} if inner is None else {"optimizer_state_dict": {**inner, field: value}}
            torch.save({**whole, **changed}, path)
            with contextlib.suppress(ModelError):  # any other error fails
                convert_checkpoint(path.parent, tmp_path / "out", LORA, "base")
                taken.add((field, what))
    assert {field for field, _ in taken - {("shared_params", "dict")}} <= HARMLESS
