"""A forecast against what is really allocated: on a CPU, at toy size, by hooks and the profiler of torch itself."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import AutoConfig

from sft_core.errors import RecipeError
from sft_core.forecast import GPUS, Forecaster, NotCountedError, Split, Trains, gpu_at_hand, read_gpu
from sft_core.forecast.counting import NF4_BYTES, Counted, Way, count_micro_batch
from sft_core.forecast.kept import kept_bytes
from sft_core.forecast.model import trained_model
from sft_core.recipe import LoraConfig, TrainConfig
from sft_core.train.attention import use_packed_attention
from sft_core.train.fused_lora import fuse_lora
from sft_core.train.loss import supervised_loss
from sft_core.train.model import load_trainable
from tests.sft_core.train_runs import config

LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TOKENS = 256
WAYS: dict[str, dict[str, Any]] = {
    "PEFT's own forward": {"fused_lora": False},
    "addmm": {},
    "recomputed": {"gradient_checkpointing": True},
    "whole model": {"lora": None},
}


def real_peak(model: Path, train: TrainConfig) -> int:
    """Bytes that the profiler sees alive at most, of what a micro-batch of one document allocates on a CPU."""
    trained, _ = load_trainable(model, train, trust_remote_code=False)
    use_packed_attention(trained)
    if train.lora is not None and train.fused_lora:
        fuse_lora(trained)
    trained.train()
    if train.gradient_checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in trained.parameters():
        if parameter.requires_grad:  # what is kept for a trained weight is another part of the forecast
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(0, trained.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(TOKENS)[None]}
    supervised_loss(trained, batch, None, "selected").backward()  # whatever is made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        supervised_loss(trained, batch, None, "selected").backward()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def counted(model: Path, train: TrainConfig, way: Way) -> Counted:
    made = trained_model(AutoConfig.from_pretrained(model), train, trust_remote_code=False)
    return count_micro_batch(made.model, TOKENS, way)


def forecaster(model: Path, train: TrainConfig, gpu: str = "h100", ranks: int = 1) -> Forecaster:
    trains = Trains(config=AutoConfig.from_pretrained(model), train=train, max_length=TOKENS, ranks=ranks)
    return Forecaster(trains, GPUS[gpu])


@pytest.mark.parametrize("name", WAYS)
def test_what_is_counted_is_what_a_cpu_allocates(name: str, tiny_model: Path) -> None:
    """The rest is the batch itself, and what transformers makes of its positions."""
    train = config(**WAYS[name])
    found = counted(tiny_model, train, Way(checkpoint_every=int(bool(train.gradient_checkpointing))))
    real = real_peak(tiny_model, train)
    assert 0.93 * real < found.peak <= real, (found.peak, real)


def test_a_split_follows_from_two_counts_of_one_row(tiny_model: Path) -> None:
    """Rows and every-second-layer are counted here, and only computed there."""
    train = config(per_device_train_batch_size="auto", gradient_accumulation_steps=8)
    for rows, every in ((4, 0), (2, 1), (4, 2)):
        found = forecaster(tiny_model, train).of(Split(rows, 8 // rows, every))
        real = counted(tiny_model, train, Way(rows=rows, checkpoint_every=every))
        peak = found.activations + max(found.logits, found.backward)
        assert real.saved <= found.activations < 1.08 * real.saved  # tables of positions are there once, not once a row
        if every == 2:  # the layers behind the one that recomputes are free again by then: of two, that is half
            assert real.peak <= peak < 1.6 * real.peak
        else:
            assert real.peak <= peak < 1.08 * real.peak


def test_layers_that_recompute_take_less_memory_and_more_time(tiny_model: Path) -> None:
    train = config(gradient_checkpointing="auto")
    every = {n: forecaster(tiny_model, train).of(Split(1, 4, n)) for n in (0, 1)}
    assert every[1].activations < every[0].activations / 4
    operations = {n: counted(tiny_model, train, Way(checkpoint_every=n)).work for n in (0, 1)}
    flops = {n: sum(work.times * work.flops for work in operations[n]) for n in (0, 1)}
    assert 1.25 < flops[1] / flops[0] < 1.5  # one more forward of the layers


def test_a_4_bit_weight_takes_what_bitsandbytes_makes_of_it() -> None:
    weight = torch.randn(1024, 1024)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held / weight.numel() == pytest.approx(NF4_BYTES, rel=1e-6)


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoConfig.for_model("llama", **LLAMA3_8B)


def test_llama_3_1_8b_by_its_published_sizes(llama: Any) -> None:
    """6.98 G linear weights, 8.03 G in all, 41.9 M in an adapter of rank 16; 16 bytes a trained weight and the sum of
    gradients beside them."""
    qlora = trained_model(llama, TrainConfig(), trust_remote_code=False)
    assert (qlora.linear, qlora.linear + qlora.other, qlora.trained) == (6_979_321_856, 8_030_261_248, 41_943_040)
    one, eight = (kept_bytes(qlora, TrainConfig(), ranks) for ranks in (1, 8))
    assert one["4-bit weights"] == pytest.approx(3.60e9, rel=0.001)
    assert one["other weights"] == pytest.approx(2.10e9, rel=0.001)
    assert one["optimizer"] == 12 * 41_943_040
    assert eight["optimizer"] == one["optimizer"] / 8
    plain = kept_bytes(qlora, TrainConfig(deepspeed=None), 1)
    assert plain["gradients"] + plain["optimizer"] + plain["adapter in float32"] == 16 * 41_943_040
    section = TrainConfig(lora=None, quantization="none", deepspeed="zero3")
    whole = trained_model(llama, section, trust_remote_code=False)
    shared = kept_bytes(whole, section, 8)
    assert shared["weights"] == pytest.approx(8.03e9 * 2 / 8, rel=0.001)
    assert shared["optimizer"] == pytest.approx(8.03e9 * 12 / 8, rel=0.001)
    assert kept_bytes(whole, section.model_copy(update={"deepspeed": "zero3_offload"}), 8)["optimizer"] == 0


@pytest.mark.slow
def test_an_8b_layer_keeps_what_was_measured_of_one_on_a_cpu(llama: Any) -> None:
    """One decoder layer of this width, PEFT's forward, bfloat16, no dropout: hooks on a CPU saw 181 KB a token."""
    section = TrainConfig(lora=LoraConfig(lora_dropout=0.0), fused_lora=False)
    made = trained_model(llama, section, trust_remote_code=False)
    found = count_micro_batch(made.model, 4096, Way(nf4=True))
    assert found.saved / 32 / 4096 == pytest.approx(181e3, rel=0.03)


def test_the_quickest_that_fits_is_chosen_and_the_rows_of_a_step_stay(tiny_model: Path) -> None:
    train = config(per_device_train_batch_size="auto", gradient_accumulation_steps=8, gradient_checkpointing="auto")
    found = forecaster(tiny_model, train)
    splits = list(found.splits())
    assert {(split.rows, split.checkpoint_every) for split in splits} == {(n, k) for n in (1, 2, 4, 8) for k in (0, 1)}
    peaks = sorted(found.of(split).peak for split in splits)
    for free in (*(peak / 0.94 + 1 for peak in peaks), 1e12):
        chosen = found.choose(free)
        assert chosen.split.rows * chosen.split.accumulation == 8
        assert chosen.peak <= free
        fitting = [found.of(split) for split in splits if found.of(split).peak <= 0.94 * free]
        assert chosen.tokens_per_second >= 0.98 * max(one.tokens_per_second for one in fitting)
    kept = Split(1, 8, 1)
    assert found.choose(1e12, before=kept).split == kept
    assert found.choose(1e12).split != kept


def test_a_forecast_leaves_the_configuration_alone(tiny_model: Path) -> None:
    """A model that was made of it before would else train with the attention that counts."""
    config_ = AutoConfig.from_pretrained(tiny_model, attn_implementation="sdpa")
    trains = Trains(config=config_, train=config(), max_length=TOKENS, ranks=1)
    Forecaster(trains, GPUS["h100"]).choose(1e12)
    assert config_._attn_implementation == "sdpa"


def test_what_cannot_fit_is_refused_with_its_sum_and_what_would(tiny_model: Path) -> None:
    train = config(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    found = forecaster(tiny_model, train)
    least = found.of(Split(1, 16, 1)).peak
    with pytest.raises(
        RecipeError, match=r"does not fit NVIDIA H100 80GB: .* 8 packed rows at once x 2, no layer"
    ) as one:
        found.choose(least + 1)
    assert "it would fit with 1 packed row at once x 16, all layers recomputed" in str(one.value)
    assert "gradient_accumulation_steps to 16" in str(one.value)
    with pytest.raises(RecipeError, match="take a shorter pack.max_length"):
        found.choose(least - 1)


def test_a_model_that_does_not_run_without_numbers_is_named_as_that(tiny_model: Path) -> None:
    """Experts are chosen by numbers."""
    mixtral = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, experts_implementation="eager",
    )  # fmt: skip
    trains = Trains(config=mixtral, train=config(), max_length=TOKENS, ranks=1)
    found = Forecaster(trains, GPUS["h100"])
    with pytest.raises(NotCountedError):
        found.choose(1e12)


def test_gpus_by_name() -> None:
    assert read_gpu("H100") == (GPUS["h100"], None)
    assert read_gpu("8xh100") == (GPUS["h100"], 8)
    with pytest.raises(RecipeError, match="--gpu h1000: not known; take one of b200, h200, h100"):
        read_gpu("h1000")
    hopper = gpu_at_hand("NVIDIA H100 80GB HBM3", 85_000_000_000)
    assert (hopper.memory, hopper.flops) == (85_000_000_000, GPUS["h100"].flops)
    assert gpu_at_hand("NVIDIA A100-SXM4-40GB", 1).bandwidth == GPUS["a100-40gb"].bandwidth
    assert gpu_at_hand("NVIDIA L4", 1).flops == GPUS["l4"].flops
    assert gpu_at_hand("Something Else", 1).flops == GPUS["h100"].flops
