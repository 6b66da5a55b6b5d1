"""Our own DeepSpeed checkpoints, of one and two ranks: the live optimizer's fp32 masters are the expected values.

Run as a script under torchrun this file is the trainer that writes them: `test_convert_deepspeed.py OUT`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0)
RICH = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, use_dora=True, use_rslora=True, modules_to_save=("lm_head",))
RUNS: dict[str, tuple[int, str, LoraConfig | None, dict[str, Any]]] = {
    "zero1-float32": (1, "float32", LORA, {}),
    "zero1-own-masters": (1, "bfloat16", LORA, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2-bfloat16": (2, "bfloat16", LORA, {}),
    "zero1-float16": (1, "float16", LORA, {}),
    "zero2-float16": (2, "float16", LORA, {}),
    "zero3-float16": (3, "float16", LORA, {}),
    "zero2-rich": (2, "bfloat16", RICH, {}),
    "zero2-full-tied": (2, "bfloat16", None, {}),
    "zero3-bfloat16": (3, "bfloat16", LORA, {}),
    "zero3-rich": (3, "bfloat16", RICH, {}),
    "zero3-full": (3, "bfloat16", None, {}),
}


@pytest.fixture(scope="session", params=[1, 2], ids=["1-rank", "2-ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Ranks, and a folder with one real training run for each of RUNS."""
    out = tmp_path_factory.mktemp("trained")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*torchrun, __file__, str(out)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return request.param, out


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


# --- the trainer behind `trained` ---


def _train(out: Path, stage: int, dtype: str, lora: LoraConfig | None, more: dict[str, Any]) -> None:
    """Three optimizer steps of a tiny model under DeepSpeed; `masters` holds the live optimizer's weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_core.train.model import peft_config
    from sft_core.train.targets import adapted_modules

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # nothing to compile on CPU
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 64}
    tied = out.name.endswith("tied")
    model: Any = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    )
    if int(os.environ["RANK"]) == 0:
        model.save_pretrained(out / "base")
    if lora is not None:
        model = get_peft_model(model, peft_config(lora, adapted_modules(model, lora)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8},
        **more,
    }
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}
    for step in range(3):
        seed = torch.Generator().manual_seed(7 * step + engine.global_rank)
        ids = torch.randint(64, (1, 9), generator=seed)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if step > 0:
            at = step + 1
            engine.save_checkpoint(
                str(out / f"checkpoint-{at}"), tag=f"global_step{at}", exclude_frozen_parameters=lora is not None
            )
    trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    masters = {_saved_name(name): safe_get_full_fp32_param(p).clone() for name, p in trainable}
    if engine.global_rank == 0:
        save_file(masters, out / "masters")


def _saved_name(name: str) -> str:
    """PEFT's, in its files."""
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


if __name__ == "__main__":
    for run_name, (zero_stage, in_dtype, adapter, extra) in RUNS.items():
        _train(Path(sys.argv[1]) / run_name, zero_stage, in_dtype, adapter, extra)
    torch.distributed.destroy_process_group()
