"""Our own DeepSpeed checkpoints, of one and two ranks: the live optimizer's fp32 masters are the expected values.

Those in float16 were made once: DeepSpeed refuses float16 on most processors.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.train.launchers import training_environment
from tests.sft_core.deepspeed_runs import LORA, RUNS

ROOT = Path(__file__).parents[2]
TRAINER = Path(__file__).with_name("deepspeed_runs.py")
FLOAT16 = ROOT / "tests" / "data" / "deepspeed_fp16.tar.xz"
"""`RANKS/RUN/...`, by make_deepspeed_fp16.py beside it."""


@pytest.fixture(scope="session", params=[1, 2], ids=["1-rank", "2-ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Ranks, and a folder with one real training run for each of RUNS."""
    out = tmp_path_factory.mktemp("trained")
    with tarfile.open(FLOAT16) as archive:
        archive.extractall(out, filter="data")
    folder = out / str(request.param)
    names = [name for name in RUNS if not (folder / name).exists()]
    assert names == [name for name, run in RUNS.items() if run[1] != "float16"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if request.param > 1 else []
    environment = {**training_environment(os.environ, request.param), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *torchrun, str(TRAINER), str(folder), *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("run", list(RUNS))
def test_deepspeed_masters_are_kept_bit_for_bit(
    trained: tuple[int, Path], tiny_model: Path, tmp_path: Path, run: str
) -> None:
    ranks, folder = trained
    stage, _, lora, _ = RUNS[run]
    options = ConvertOptions(base=folder / run / "base", tokenizer=tiny_model)
    outcome = convert_checkpoint(folder / run / "checkpoint-3", tmp_path, lora, "base", options)
    got = load_file(tmp_path / ("model.safetensors" if lora is None else "adapter_model.safetensors"))
    expected = load_file(folder / run / "masters")
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(got[name], tensor), name
    assert (outcome.facts["ranks"], outcome.facts["layout"]) == (ranks, f"deepspeed-zero{stage}")
    assert outcome.facts["global_steps"] == 3


def copy_of(trained: tuple[int, Path], run: str, tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(trained[1] / run / "checkpoint-3", checkpoint)
    return checkpoint


@pytest.mark.slow
def test_a_missing_rank_and_a_torn_rank_are_refused(trained: tuple[int, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(trained, "zero2-bfloat16", tmp_path)
    last = next(checkpoint.glob(f"global_step3/*zero_pp_rank_{trained[0] - 1}_*_optim_states.pt"))
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(ModelError, match=f"{last.name}: torn"):
        convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")
    last.unlink()
    says = "optim_states.pt: the ranks" if trained[0] == 1 else r"missing ranks \[1\]"
    with pytest.raises(ModelError, match=says):
        convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["zero2-bfloat16", "zero3-bfloat16"])
def test_a_rank_of_another_step_is_refused(trained: tuple[int, Path], tmp_path: Path, run: str) -> None:
    checkpoint = copy_of(trained, run, tmp_path)
    for rank in range(trained[0]):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        older = checkpoint / "global_step3" / name
        shutil.copyfile(trained[1] / run / "checkpoint-2" / "global_step2" / name, older)
        if run.startswith("zero2") or (rank == 0 and trained[0] == 2):
            with pytest.raises(ModelError, match="of another step|different checkpoints"):
                convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")


@pytest.mark.slow
def test_a_stale_latest_is_refused(trained: tuple[int, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(trained, "zero2-bfloat16", tmp_path)
    for tag in ("global_step9", "../elsewhere", ""):
        (checkpoint / "latest").write_text(tag)
        with pytest.raises(ModelError, match="latest: names"):
            convert_checkpoint(checkpoint, tmp_path / "out", LORA, "base")
