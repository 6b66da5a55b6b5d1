"""What a rank asks of its machine: exact positions, the same bits, no wasted memory; and DeepSpeed's settings."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sft_core.errors import TrainError
from sft_core.recipe import LoraConfig
from sft_core.train import launchers
from sft_core.train.initial import largest_part
from sft_core.train.launchers import training_environment
from sft_core.train.machine import be_deterministic, check_rotary, restore_rotary
from sft_core.train.model import freeze, load_base
from sft_core.train.worker import _leave_out
from sft_core.train.zero import PRESETS, deepspeed_config
from tests.sft_core.architectures import SMALL
from tests.sft_core.test_train_saving import arguments
from tests.sft_core.train_runs import config, spec_below, status_here, train_here, weights_hash

ROOT = Path(__file__).parents[2]


def tiny(kind: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SMALL))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_sixteen_bit_frequencies_are_refused(kind: str) -> None:
    model = tiny(kind).to(torch.bfloat16)  # a cast of everything, as DeepSpeed before 0.19.8
    with pytest.raises(TrainError, match=r"inv_freq is held in bfloat16.*Update DeepSpeed \(0\.19\.8 or later"):
        check_rotary(model)
    check_rotary(tiny(kind))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_sixteen_bit_frequencies_are_made_anew(kind: str) -> None:
    """As ZeRO-3 leaves them: rounded for good, so no cast brings them back."""
    model, plain = tiny(kind).to(torch.bfloat16), tiny(kind)
    restore_rotary(model)
    check_rotary(model)
    exact = {name: buffer for name, buffer in plain.named_buffers() if name.endswith("inv_freq")}
    found = {name: buffer for name, buffer in model.named_buffers() if name in exact}
    assert len(exact) == 2
    for name, buffer in exact.items():
        assert torch.equal(found[name], buffer), name
        assert not torch.equal(buffer, buffer.bfloat16().float()), name


def test_a_training_with_sixteen_bit_frequencies_does_not_begin(
    packed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_core.train import model as module

    loaded = module.load_base
    monkeypatch.setattr(module, "load_base", lambda *args: loaded(*args).bfloat16())
    with pytest.raises(TrainError, match="inv_freq is held in bfloat16"):
        status_here(packed, tiny_model, tmp_path, config(dtype="bfloat16"))
    assert not (tmp_path / "work" / "checkpoint-5").exists()


@pytest.mark.parametrize(
    ("changes", "own_code", "expected"),
    [
        ({}, False, {"mlflow", "scipy", "bitsandbytes", "deepspeed"}),
        ({"quantization": "nf4", "deepspeed": "zero2"}, False, {"mlflow", "scipy"}),
        ({}, True, {"mlflow"}),
    ],
)
def test_a_rank_leaves_out_what_it_has_no_use_for(
    changes: dict[str, Any], own_code: bool, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, modules = SimpleNamespace(config=config(**changes), trust_remote_code=own_code), dict[str, Any]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", modules)
        _leave_out(spec)
    assert modules == dict.fromkeys(expected)


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """torch's settings of determinism, and the environment, are put back."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("as_it_was")
def test_deterministic_training_takes_torchs_strict_form(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    plain = train_here(packed, tiny_model, tmp_path / "plain", config(max_steps=2))
    assert not torch.are_deterministic_algorithms_enabled()
    strict = train_here(packed, tiny_model, tmp_path / "strict", config(max_steps=2, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with warnings, flash attention goes by atomics
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert weights_hash(strict) == weights_hash(plain)  # on a CPU nothing changes


@pytest.mark.usefixtures("as_it_was")
def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

    def settings(environment: dict[str, str]) -> list[str | None]:
        child = training_environment(environment, 1)
        return [child.get(key) for key in keys]

    assert settings({}) == ["expandable_segments:True", None]
    assert settings({keys[0]: "backend:cudaMallocAsync"}) == ["backend:cudaMallocAsync", None]
    assert settings({keys[1]: ""}) == [None, ""]
    monkeypatch.setattr(launchers, "version", lambda _: "2.8.0+cu128")
    assert settings({}) == [None, "expandable_segments:True"]


@pytest.mark.parametrize(("in_float32", "rest"), [(True, torch.float32), (False, torch.bfloat16)])
def test_what_is_not_in_4_bits_stays_in_16_on_a_gpu(in_float32: bool, rest: torch.dtype, tiny_model: Path) -> None:
    model = load_base(tiny_model, config(quantization="nf4", dtype="bfloat16"), False)
    freeze(model, in_float32)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert dtypes[name] == rest
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.uint8


@pytest.mark.parametrize("rank", [4, 16])
def test_the_randomised_svd_takes_nearly_all_and_the_same_each_time(rank: int) -> None:
    matrix = torch.randn(
        256, 320, generator=torch.Generator().manual_seed(1)
    )  # singular values fall as slowly as can be
    state = torch.get_rng_state()
    left, sizes, right = largest_part(matrix, rank)
    assert torch.equal(state, torch.get_rng_state())
    assert [tuple(part.shape) for part in (left, sizes, right)] == [(256, rank), (rank,), (rank, 320)]
    most = torch.linalg.svdvals(matrix)[:rank].square().sum()
    taken = matrix.square().sum() - (matrix - left * sizes @ right).square().sum()
    assert 0.99 * most < taken <= 1.0001 * most
    torch.manual_seed(5)
    assert all(
        torch.equal(one, other) for one, other in zip(largest_part(matrix, rank), (left, sizes, right), strict=True)
    )


@pytest.mark.parametrize(("ranks", "overlaps"), [("1", False), ("8", True)])
def test_one_rank_holds_no_second_buffer(
    ranks: str, overlaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_core.train.arguments import _deepspeed
    from sft_core.train.spec import TrainSpec

    monkeypatch.setenv("WORLD_SIZE", ranks)
    section = config(deepspeed="zero2").model_dump(mode="json")
    paths = dict.fromkeys(("packed", "base_model", "checkpoints", "metrics"), "x")
    found = _deepspeed(TrainSpec(**paths, trust_remote_code=False, train=section, seed=1), cuda=True)
    assert found is not None
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": overlaps, "reduce_bucket_size": "auto"}
    assert PRESETS["zero2"]["overlap_comm"]  # the preset itself is not touched


def test_every_preset_but_zero1_adds_gradients_in_float32() -> None:
    types = {name: (deepspeed_config(config(deepspeed=name)) or {}).get("data_types") for name in PRESETS}
    assert types.pop("zero1") is None
    assert set(map(str, types.values())) == {"{'grad_accum_dtype': 'fp32'}"}


def test_adamw_is_the_fused_one(tmp_path: Path) -> None:
    assert arguments(tmp_path, config()).optim == "adamw_torch_fused"


@pytest.mark.slow
def test_deepspeed_adds_up_and_sends_as_it_is_told(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(packed), str(tiny_model), str(tmp_path)]  # a process group of its own
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600.0, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    hidden = transformers.AutoConfig.from_pretrained(tiny_model).hidden_size
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "bucket": hidden**2,
        "overlaps": False,
        "added in": "torch.float32",
        "weights": "torch.bfloat16",
        "fused": True,
        "timer": False,
        "sum": 1.0 + 2**-9,  # bfloat16 has 8 bits: there it is 1
    }


def facts(packed: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Of a real rank under ZeRO-2 in bfloat16, and of a sum of two gradients there."""
    from sft_core.train.launchers import free_port
    from sft_core.train.ranks import Heart
    from sft_core.train.trainer import PackedTrainer
    from sft_core.train.worker import run

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())
    made: list[Any] = []
    train = PackedTrainer.train

    def keep(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(trainer)
        return train(trainer, *args, **kwargs)

    PackedTrainer.train = keep  # type: ignore[method-assign]
    section = config(deepspeed="zero2", dtype="bfloat16", max_steps=1, gradient_accumulation_steps=2)
    spec = spec_below(folder, packed, model, section)
    beats = Path(spec.checkpoints) / "ranks"
    assert run(spec, Heart(beats, "0", 600), 600) == 0
    engine = made[0].model_wrapped
    optimizer = engine.optimizer
    return {
        "bucket": optimizer.reduce_bucket_size,
        "overlaps": optimizer.overlap_comm,
        "added in": str(optimizer.gradient_accumulation_dtype),
        "weights": str(optimizer.dtype),
        "fused": bool(optimizer.optimizer.param_groups[0]["fused"]),
        "timer": engine.tput_timer.config.enabled,
        "sum": sum_of_two_gradients(),
    }


def sum_of_two_gradients() -> float:
    """What one weight gets from gradients of 1 and 2 ** -9, of two micro-batches, by SGD at a rate of 1."""
    import deepspeed

    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    settings = deepspeed_config(config(deepspeed="zero2", dtype="bfloat16", lora=LoraConfig().model_dump())) or {}
    settings["zero_optimization"]["reduce_bucket_size"] = 64
    settings |= {"gradient_clipping": 0.0, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=settings)
    for gradient in (1.0, 2**-9):
        engine.backward(
            engine(torch.full((1, 1), 1.0, dtype=torch.bfloat16)).sum() * 2 * gradient
        )  # halved by DeepSpeed
        engine.step()
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    return -float(master.flatten()[0])


if __name__ == "__main__":
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed would import it
    print(json.dumps(facts(*map(Path, sys.argv[1:]))))
