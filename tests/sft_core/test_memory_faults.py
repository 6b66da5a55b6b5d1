"""Memory that ran out is one clear error, and work that can be cut in halves goes on."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sft_core.errors import MemoryFault, TrainError
from sft_core.memory_faults import by_halves, memory_fault, naming_memory_faults
from sft_core.train.machine import naming_limits
from tests.sft_core.train_runs import config

OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 22.4 GiB memory in use. Of the allocated memory 20 GiB is "
    "allocated by PyTorch. See documentation for Memory Management"
)
"""torch 2.13's words."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError(OF_A_GPU),
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB "
            "is free",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "alloc",
        ),
        (MemoryError(), "the machine is out of memory"),
    ],
)
def test_what_torch_says_of_memory_is_known(error: Exception, words: str) -> None:
    assert words in str(memory_fault(error))
    with pytest.raises(ValueError, match="could not load") as outer:
        raise ValueError("could not load") from error
    assert words in str(memory_fault(outer.value))


def test_other_errors_are_none_of_memory() -> None:
    assert memory_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert memory_fault(ValueError("out of memory")) is None
    assert memory_fault(None) is None
    with pytest.raises(RuntimeError, match="shapes"), naming_memory_faults("x"):
        raise RuntimeError("shapes")


def test_a_real_lack_of_memory_on_this_machine_is_named() -> None:
    with (
        pytest.raises(MemoryFault, match=r"here: .*can't allocate memory.*; end other programs"),
        naming_memory_faults("here"),
    ):
        torch.empty(2**58, dtype=torch.uint8)


class Room:
    """Work for up to `size` items at a time; remembers what was asked of it."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, []  # type: int, list[int]

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.asked.append(len(items))
        if len(items) > self.size:
            raise torch.OutOfMemoryError(OF_A_GPU)
        return [10 * item for item in items]


def test_work_is_halved_until_it_fits_and_keeps_its_order() -> None:
    room = Room(2)
    assert by_halves(room, [1, 2, 3, 4, 5, 6, 7]) == [10, 20, 30, 40, 50, 60, 70]
    assert room.asked == [7, 3, 1, 2, 4, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        by_halves(Room(0), [1, 2])


def test_what_did_not_fit_is_gone_before_its_halves_are_tried() -> None:
    alive: list[Any] = []

    def work(items: Sequence[int]) -> list[int]:
        assert not any(tensor() is not None for tensor in alive)
        held = torch.zeros(3)
        alive.append(weakref.ref(held))
        if len(items) > 1:
            raise torch.OutOfMemoryError(OF_A_GPU)
        return list(items)

    assert by_halves(work, [1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"gradient_checkpointing": True},
            r"training on 1 packed row\(s\) of up to 4096 tokens at a time: CUDA out of memory.*is free; "
            r"lower pack\.max_length$",
        ),
        (
            {"per_device_train_batch_size": 4},
            r"training on 4 packed.*; lower train\.per_device_train_batch_size \(and raise gradient_accumulation_steps "
            r"by as much\), or set train\.gradient_checkpointing: true, or lower pack\.max_length$",
        ),
    ],
)
def test_training_says_what_did_not_fit_and_what_to_lower(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MemoryFault, match=words), naming_limits(config(**changes), 4096):
        raise torch.OutOfMemoryError(OF_A_GPU)


def test_what_has_no_deterministic_form_names_the_key() -> None:
    torchs = (
        "histc_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic...'. You can"
    )
    with (
        pytest.raises(TrainError, match=r"train\.deterministic: histc_cuda does not have .*; set train\.deterministic"),
        naming_limits(config(), 1),
    ):
        raise RuntimeError(torchs)
    with pytest.raises(RuntimeError, match="other"), naming_limits(config(), 1):
        raise RuntimeError("other")
