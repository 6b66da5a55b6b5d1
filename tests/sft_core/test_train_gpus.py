"""GPUs are counted as torch sees them, and one that torch cannot use is an error, never a training on the CPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_core.errors import TrainError
from sft_core.train import TrainInputs, gpus, train_adapter
from sft_core.train.gpus import check_cuda, check_ranks, count_gpus, sign_of_gpu
from sft_core.train.worker import _avoid_nvml
from tests.sft_core.train_runs import config

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
TORCH = """
import os
__version__ = "2.13.0+cu130"
class _Tensor:
    def add_(self, _): return self
    def item(self): return 1.0
def zeros(n, device):
    {kernel}
    return _Tensor()
class cuda:
    @staticmethod
    def device_count(): return {count}
    @staticmethod
    def init():
        {init}
"""
"""As much of torch as the child asks."""


def with_torch(folder: Path, **parts: Any) -> dict[str, str]:
    """An environment in which `import torch` finds a torch of one's own. Nothing else of the machine counts."""
    text = TORCH.format(**({"count": 8, "init": "pass", "kernel": "pass"} | parts))
    (folder / "torch.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("GPU-8932f937,GPU-77a", 2), ("MIG-a,MIG-b", 1)])
def test_as_many_as_torch_sees(visible: str, count: int, tmp_path: Path) -> None:
    assert count_gpus(with_torch(tmp_path, count=count) | {"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", " ", "-1,0"])
def test_no_visible_device_means_the_cpu(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "sign_of_gpu", lambda: "/dev/nvidia0")
    monkeypatch.setattr(gpus, "_ask_torch", lambda _: pytest.fail("nobody has to be asked"))
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == 0


def test_without_a_driver_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "sign_of_gpu", lambda: None)
    monkeypatch.setattr(gpus, "_ask_torch", lambda _: pytest.fail("nobody has to be asked"))
    assert count_gpus({}) == 0


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"init": f"raise RuntimeError({TOO_OLD!r})"},
            "torch 2.13.0.cu130 cannot use it.*driver on your system is too old",
        ),
        ({"init": "raise RuntimeError('No CUDA GPUs are available')", "count": 0}, "No CUDA GPUs are available"),
        ({"kernel": "raise RuntimeError('no kernel image is available')"}, "no kernel image is available"),
        ({"init": "os._exit(3)"}, "GPUs were looked for.*exit status 3"),
    ],
)
def test_what_torch_cannot_use_is_an_error_with_its_reason(
    parts: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "sign_of_gpu", lambda: "/dev/nvidia0")
    with pytest.raises(TrainError, match=words) as caught:
        count_gpus(with_torch(tmp_path, **parts))
    assert 'CUDA_VISIBLE_DEVICES="" trains on the CPU' in str(caught.value)


def test_a_driver_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ASK_SECONDS", 1.0)
    environment = with_torch(tmp_path, init="__import__('time').sleep(60)") | {"CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(TrainError, match="no answer about GPUs within 1 s"):
        count_gpus(environment)


def test_signs_of_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libnothing.so.99")
    assert sign_of_gpu(tmp_path) is None
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)  # a container without its device nodes
    assert sign_of_gpu(tmp_path) == str(tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia3").touch()  # one GPU of eight
    assert sign_of_gpu(tmp_path) == str(tmp_path / "dev/nvidia3")
    monkeypatch.setattr(gpus, "LIBRARY", "libc.so.6")
    assert str(sign_of_gpu(tmp_path / "elsewhere")).endswith("/libc.so.6")
    monkeypatch.setattr(gpus, "COMPATIBILITY", "/libc.so.6")  # as if an image had brought it along
    assert sign_of_gpu(tmp_path / "elsewhere") is None


@NO_CUDA
def test_a_training_for_a_gpu_that_is_none_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # the real torch is asked
    inputs = TrainInputs(packed=tmp_path, base_model=tmp_path, trust_remote_code=False, work=tmp_path / "work")
    with pytest.raises(TrainError, match="CUDA_VISIBLE_DEVICES=0 speaks of a GPU, but torch .* cannot use it"):
        train_adapter(inputs, config(), 1, tmp_path / "out")
    assert not (tmp_path / "work" / "train.log").exists()


@NO_CUDA
def test_a_rank_without_the_gpu_it_was_started_for_fails() -> None:
    check_cuda(None)
    check_cuda(False)
    with pytest.raises(TrainError, match="the run was started for GPUs, but torch .* cannot use it"):
        check_cuda(True)


def test_more_ranks_than_gpus_are_refused() -> None:
    check_ranks(8, 8)
    check_ranks(2, 0)  # on a CPU
    with pytest.raises(TrainError, match="8 ranks on this machine, but torch sees 1 GPU"):
        check_ranks(8, 1)


def test_deepspeed_asks_no_nvml_for_devices_with_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import cuda_accelerator

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    nvml = SimpleNamespace(nvmlDeviceGetHandleByIndex=lambda number: number)
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 11)
    accelerator = cuda_accelerator.CUDA_Accelerator()
    with pytest.raises(ValueError, match="invalid literal for int"):
        accelerator.available_memory(0)
    _avoid_nvml()
    assert accelerator.available_memory(0) == 69
