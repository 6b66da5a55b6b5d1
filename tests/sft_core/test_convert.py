"""Checkpoints to adapters: XTuner's real ones, our own of one and two ranks, and those that must be refused.

Run as a script under torchrun this file is the trainer that writes our own: `test_convert.py OUT`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_core.convert import convert_checkpoint
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

ROOT = Path(__file__).parents[2]
XTUNER = ROOT.parent / "shared" / "checkpoints" / "xtuner"
LORA = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0)
RUNS = (("zero1-float32", 1, False), ("zero2-bfloat16", 2, True), ("zero3-bfloat16", 3, True))
A, B = "base_model.model.model.layers.0.mlp.up_proj.lora_A", "base_model.model.model.layers.0.mlp.up_proj.lora_B"

needs_xtuner = pytest.mark.skipif(not XTUNER.is_dir(), reason=f"XTuner's checkpoints are not at {XTUNER}")


def convert(checkpoint: Path, out: Path, lora: LoraConfig = LORA, **more: Any) -> dict[str, torch.Tensor]:
    convert_checkpoint(checkpoint, out, lora, "base", **more)
    return load_file(out / "adapter_model.safetensors")


def assert_bitwise_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def tiny(**changes: Any) -> dict[str, torch.Tensor]:
    """One module's pair under XTuner's names, trained in the sense that B is not zero."""
    tensors = {f"llm.{A}.default.weight": torch.randn(3, 8), f"llm.{B}.default.weight": torch.ones(4, 3)}
    return {**tensors, **changes}


def save_pth(path: Path, state_dict: Any) -> Path:
    torch.save({"meta": {"iter": 7}, "state_dict": state_dict}, path)
    return path


# --- XTuner's real checkpoints ---


@needs_xtuner
@pytest.mark.parametrize(
    ("run", "layout", "ranks"), [("lora/iter_4.pth", "xtuner-pth", 1), ("lora_ds2/iter_4.pth", "deepspeed-zero2", 2)]
)
def test_xtuner_masters_are_kept_bit_for_bit(tmp_path: Path, run: str, layout: str, ranks: int) -> None:
    name = run.partition("/")[0]
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0)
    outcome = convert_checkpoint(XTUNER / run, tmp_path, lora, "base")
    expected = load_file(XTUNER / "expected" / f"{name}.fp32.safetensors")
    assert_bitwise_equal(load_file(tmp_path / "adapter_model.safetensors"), expected)
    assert outcome.facts["norm_b"] == pytest.approx(
        sum(float(t.double().norm() ** 2) for n, t in expected.items() if "lora_B" in n) ** 0.5
    )
    assert {k: outcome.facts[k] for k in ("tensors", "parameters", "layout", "ranks", "global_steps")} == {
        "tensors": 28,
        "parameters": 1856,
        "layout": layout,
        "ranks": ranks,
        "global_steps": 4,
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((XTUNER / "expected" / f"{name}.adapter_config.json").read_text())
    assert config["target_modules"] == sorted(theirs.pop("target_modules"))
    assert {key: config[key] for key in theirs if key in config} == {k: v for k, v in theirs.items() if k in config}


# --- our own, of one and two ranks ---


@pytest.fixture(scope="session", params=[1, 2], ids=["1-rank", "2-ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Ranks, and a folder with one real training run for each of RUNS."""
    out = tmp_path_factory.mktemp("trained")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*torchrun, __file__, str(out)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return request.param, out


@pytest.mark.slow
@pytest.mark.parametrize("run", [name for name, *_ in RUNS])
def test_deepspeed_masters_are_kept_bit_for_bit(trained: tuple[int, Path], tmp_path: Path, run: str) -> None:
    ranks, folder = trained
    checkpoint = folder / run / "checkpoint-3"
    outcome = convert_checkpoint(checkpoint, tmp_path, LORA, "base")
    assert_bitwise_equal(load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / run / "masters"))
    assert (outcome.facts["ranks"], outcome.facts["layout"]) == (ranks, f"deepspeed-{run.partition('-')[0]}")
    assert outcome.facts["global_steps"] == 3


@pytest.mark.slow
def test_a_missing_rank_and_a_torn_rank_are_refused(trained: tuple[int, Path], tmp_path: Path) -> None:
    ranks, folder = trained
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "zero2-bfloat16" / "checkpoint-3", checkpoint)
    last = next(checkpoint.glob(f"global_step3/*zero_pp_rank_{ranks - 1}_*_optim_states.pt"))
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(ModelError, match=f"{last.name}: torn"):
        convert(checkpoint, tmp_path / "out")
    last.unlink()
    with pytest.raises(ModelError, match="optim_states.pt: the ranks" if ranks == 1 else r"missing ranks \[1\]"):
        convert(checkpoint, tmp_path / "out")


@pytest.mark.slow
def test_a_stale_latest_is_refused(trained: tuple[int, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(trained[1] / "zero2-bfloat16" / "checkpoint-3", checkpoint)
    for tag in ("global_step9", "../elsewhere", ""):
        (checkpoint / "latest").write_text(tag)
        with pytest.raises(ModelError, match="latest: names"):
            convert(checkpoint, tmp_path / "out")


# --- plain Trainer folders, and folders around checkpoints ---


def test_plain_trainer_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    tensors = {f"{A}.weight": torch.randn(3, 8).bfloat16(), f"{B}.weight": torch.ones(4, 3).bfloat16()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text("template")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    assert_bitwise_equal(convert(tmp_path / "run", tmp_path / "newest"), tensors)
    assert_bitwise_equal(convert(checkpoint, tmp_path / "out"), tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    with pytest.raises(ModelError, match=r"lora_alpha is 6, train\.lora\.lora_alpha is 7"):
        convert(checkpoint, tmp_path / "out", LoraConfig(r=3, lora_alpha=7))


def test_tokenizer_comes_from_beside_the_checkpoint_or_from_where_one_says(tmp_path: Path) -> None:
    checkpoint = save_pth(tmp_path / "iter_7.pth", tiny())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("beside")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("other")
    convert(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "beside"
    convert(checkpoint, tmp_path / "out", tokenizer=tmp_path / "other")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "other"
    with pytest.raises(ModelError, match="no tokenizer there"):
        convert(checkpoint, tmp_path / "out", tokenizer=tmp_path)


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path) -> None:
    tensors = tiny()
    first = save_pth(tmp_path / "a.pth", tensors)
    second = save_pth(tmp_path / "b.pth", dict(reversed(tensors.items())))
    for checkpoint, out in ((first, "a"), (second, "b")):
        convert(checkpoint, tmp_path / out)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dtype_rounds_once(tmp_path: Path) -> None:
    tensors = tiny()
    got = convert(save_pth(tmp_path / "iter_7.pth", tensors), tmp_path / "out", dtype="bfloat16")
    assert torch.equal(got[f"{A}.weight"], tensors[f"llm.{A}.default.weight"].bfloat16())
    big = save_pth(tmp_path / "big.pth", tiny(**{f"llm.{B}.default.weight": torch.full((4, 3), 1e6)}))
    with pytest.raises(ModelError, match="infinity"):
        convert(big, tmp_path / "out", dtype="float16")


# --- refused ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"llm.{B}.default.weight": torch.full((4, 3), torch.nan)}, "lora_B.weight holds NaN"),
        ({f"llm.{A}.default.weight": torch.full((3, 8), torch.inf)}, "lora_A.weight holds NaN or infinity"),
        ({f"llm.{B}.default.weight": torch.zeros(4, 3)}, "every lora_B is zero"),
        ({f"llm.{B}.default.weight": torch.ones(4, 2)}, r"shape \(4, 2\), which is not of rank train.lora.r = 3"),
        ({"llm.base_model.model.x.lora_A.default.weight": torch.ones(3, 8)}, "x.lora_B.weight is missing"),
        ({f"{A}.default.weight": torch.ones(3, 8)}, "and another tensor are both"),
        ({"llm.model.layers.0.mlp.up_proj.weight": torch.ones(3)}, "not a lora_A or lora_B weight"),
    ],
)
def test_incomplete_or_untrained_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    checkpoint = save_pth(tmp_path / "iter_7.pth", tiny(**changes))
    with pytest.raises(ModelError, match=says):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = save_pth(tmp_path / "whole.pth", tiny()).read_bytes()
    for number, content in enumerate((whole[:-1], whole[: len(whole) // 2], b"", b"not a zip file at all")):
        path = tmp_path / f"torn{number}.pth"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"torn{number}.pth: torn"):
            convert(path, tmp_path / "out")
    with pytest.raises(ModelError, match="no such file or folder"):
        convert(tmp_path / "absent.pth", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither DeepSpeed's files"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ModelError, match="holds no adapter tensors"):
        convert(save_pth(tmp_path / "nothing.pth", {}), tmp_path / "out")


class Get:
    """Pickles as `getattr(owner, name)`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)

    def __call__(self) -> None: ...


class Call:
    """Pickles as `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments

    def __call__(self) -> None: ...


def _getattr_chain(marker: Path) -> Any:
    """`open(marker, "w")`, reached through getattr and functions of torch alone."""
    builtins = Call(Get(Get(torch._utils._rebuild_tensor_v2, "__globals__"), "get"), "__builtins__")
    return Call(Call(Get(builtins, "get"), "open"), str(marker), "w")


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (lambda marker: Call(os.system, f"touch '{marker}'"), "names posix.system"),
        (lambda marker: Call(Path(marker).touch), "names pathlib"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "names eval"),
        (_getattr_chain, "does more than a checkpoint"),
    ],
)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path: Path, attack: Any, says: str) -> None:
    marker = tmp_path / "executed"
    checkpoint = save_pth(tmp_path / "iter_7.pth", {**tiny(), "x": attack(marker)})
    with pytest.raises(ModelError, match=f"{says}.*nothing was executed"):
        convert(checkpoint, tmp_path / "out")
    assert not marker.exists()
    torch.load(checkpoint, weights_only=False)
    assert marker.exists(), "the attack itself must work, or this test shows nothing"


# --- the trainer behind `trained` ---


def _train(out: Path, stage: int, bf16: bool) -> None:
    """Three optimizer steps of a tiny LoRA under DeepSpeed; `masters` holds the live optimizer's weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # nothing to compile on CPU
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    model = get_peft_model(base, PeftLoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)
    for step in range(3):
        seed = torch.Generator().manual_seed(7 * step + engine.global_rank)
        ids = torch.randint(64, (1, 9), generator=seed)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    masters = {name.replace(".default", ""): safe_get_full_fp32_param(p).clone() for name, p in trainable}
    engine.save_checkpoint(str(out / "checkpoint-3"), tag="global_step3", exclude_frozen_parameters=True)
    if engine.global_rank == 0:
        save_file(masters, out / "masters")


if __name__ == "__main__":
    for run_name, zero_stage, in_bf16 in RUNS:
        _train(Path(sys.argv[1]) / run_name, zero_stage, in_bf16)
    torch.distributed.destroy_process_group()
