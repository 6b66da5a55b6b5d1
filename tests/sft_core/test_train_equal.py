"""Whatever trains the same rows the same way trains the same weights: every step's loss and the weights at the end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from sft_core.recipe import TrainConfig
from sft_core.train.arguments import training_arguments
from sft_core.train.checkpoints import read_mark
from sft_core.train.metrics import read_metrics
from sft_core.train.spec import TrainSpec
from sft_core.train.world_size import RESIZED
from tests.sft_core.train_runs import (
    assert_same_run,
    config,
    losses,
    make_packed,
    train,
    train_here,
    train_together,
    weights,
)

FULL = config(lora=None, max_steps=3)
ONE_RANK = {
    "zero1": config(deepspeed="zero1"),
    "zero2": config(deepspeed="deepspeed_zero2"),
    "zero3": config(deepspeed="zero3"),
    "zero2_offload": config(deepspeed="zero2_offload"),
    "zero3_offload": config(deepspeed="zero3_offload"),
    "all weights, zero2": FULL.model_copy(update={"deepspeed": "zero2"}),
    "all weights, zero3": FULL.model_copy(update={"deepspeed": "zero3"}),
}
SHARED = {"num_processes": 2, "gradient_accumulation_steps": 2}
TWO_RANKS = {
    "two ranks": config(**SHARED),
    "two ranks, 4-bit base": config(**SHARED, deepspeed="zero2", quantization="nf4"),
    "two ranks, zero3": config(**SHARED, deepspeed="zero3"),
}
SPLITS: dict[str, dict[str, Any]] = {
    "micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "pairs": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}
TWO_RANKS_ZERO2 = config(**SHARED, deepspeed="zero2", save_steps=2, save_total_limit=9)


@pytest.fixture(scope="module")
def plain(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal: one rank, no DeepSpeed, micro-batches of one row."""
    return train_here(packed, tiny_model, tmp_path_factory.mktemp("plain"), config(save_steps=2, save_total_limit=9))


@pytest.fixture(scope="module")
def plain_qlora(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a 4-bit base."""
    return train_here(packed, tiny_model, tmp_path_factory.mktemp("nf4"), config(quantization="nf4"))


@pytest.fixture(scope="module")
def plain_full(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights, one rank, no DeepSpeed."""
    return train_here(packed, tiny_model, tmp_path_factory.mktemp("full"), FULL)


@pytest.fixture(scope="module")
def two_ranks(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks under ZeRO-2, with its checkpoints."""
    return train(packed, tiny_model, tmp_path_factory.mktemp("two"), TWO_RANKS_ZERO2)


@pytest.fixture(scope="module")
def one_rank(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONE_RANK, all in one process."""
    return train_together(packed, tiny_model, tmp_path_factory.mktemp("one"), ONE_RANK)


@pytest.fixture(scope="module")
def by_two_ranks(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TWO_RANKS, all in one pair of processes."""
    return train_together(packed, tiny_model, tmp_path_factory.mktemp("pair"), TWO_RANKS)


@pytest.mark.slow
def test_a_rank_s_work_is_the_same_in_this_process_and_in_its_own(
    plain: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert_same_run(train(packed, tiny_model, tmp_path, config()), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_under_deepspeed_equals_one_without(
    name: str, one_rank: dict[str, Path], plain: Path, plain_full: Path
) -> None:
    whole = name.startswith("all weights")
    assert ("lm_head.weight" in weights(one_rank[name])) == whole
    assert_same_run(one_rank[name], plain_full if whole else plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(name: str, by_two_ranks: dict[str, Path], plain: Path, plain_qlora: Path) -> None:
    assert_same_run(by_two_ranks[name], plain_qlora if "4-bit" in name else plain)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["plain", "plain_qlora"])
@pytest.mark.parametrize("name", SPLITS)
def test_micro_batches_and_recomputed_activations_change_nothing(
    name: str, base: str, packed: Path, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    section = config(quantization="nf4" if base == "plain_qlora" else "none", **SPLITS[name])
    assert_same_run(train_here(packed, tiny_model, tmp_path, section), request.getfixturevalue(base))


@pytest.mark.slow
def test_two_ranks_under_zero2_equal_one(two_ranks: Path, plain: Path) -> None:
    assert_same_run(two_ranks, plain)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: int, two_ranks: Path, plain: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """From the checkpoint of step 2 on: the same rows in the same order, to the same weights as one rank alone."""
    begun, section = (two_ranks, TWO_RANKS_ZERO2) if ranks == 1 else (plain, config())
    shutil.copytree(begun.parent / "work" / "checkpoint-2", tmp_path / "work" / "checkpoint-2")
    shutil.copy(begun / "metrics.jsonl", tmp_path / "work")
    lines: list[str] = []
    section = section.model_copy(update={"num_processes": ranks})
    found = train(packed, tiny_model, tmp_path, section, lines.append)
    assert f"goes on with {ranks}: the same rows an optimizer step, {4 // ranks} micro-batches a rank" in lines[0]
    assert any(line.startswith("resuming from checkpoint-2") for line in lines)
    assert_same_run(found, plain)
    assert not (tmp_path / "work" / RESIZED).exists()
    mark = read_mark(found / "checkpoint")
    assert mark is not None
    assert (mark.world_size, mark.micro_batches) == (ranks, 4)


@pytest.mark.slow
def test_packed_rows_train_as_their_conversations_alone(
    packed: Path, tiny_model: Path, write_conversations: Callable[..., Path], tmp_path: Path
) -> None:
    """One optimizer step over all 40 conversations: packed several to a row, or each in a row of its own."""
    alone = make_packed(tmp_path, tiny_model, write_conversations, packing="none")
    section = config(num_train_epochs=3, max_steps=None, gradient_accumulation_steps=40, per_device_train_batch_size=1)
    rows = {}
    for name, folder, accumulation in (("packed", packed, rows_an_epoch(packed)), ("alone", alone, 40)):
        whole_epochs = section.model_copy(update={"gradient_accumulation_steps": accumulation})
        rows[name] = train_here(folder, tiny_model, tmp_path / name, whole_epochs)
    assert rows_an_epoch(packed) < 40 == rows_an_epoch(alone)
    assert len(losses(rows["packed"])) == 3
    assert_same_run(rows["packed"], rows["alone"])


def rows_an_epoch(packed: Path) -> int:
    """Packed rows of the first epoch."""
    from sft_core.pack import load_packed

    return len(load_packed(packed).bins(0))


@pytest.mark.slow
def test_the_learning_rate_is_transformers_cosine_schedule_but_never_0(plain: Path) -> None:
    found = [entry["learning_rate"] for entry in read_metrics(plain / "metrics.jsonl")]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=5)
    expected = []
    for _ in range(5):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert expected[:2] == [0.0, 0.005]
    assert found == pytest.approx([0.01 / 3, 0.02 / 3, *expected[2:]], abs=1e-12)


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 100, 3), (0.03, 101, 4), (0.0, 7, 0), (1.0, 7, 7)])
def test_warm_up_is_rounded_up_as_the_trainer_does(ratio: float, steps: int, expected: int, tmp_path: Path) -> None:
    arguments = training_arguments(spec_of(config(warmup_ratio=ratio), tmp_path), steps)
    assert arguments.get_warmup_steps(steps) == expected
    if 0 < ratio < 1:  # what the Trainer itself makes of a fraction
        assert TrainingArguments(warmup_steps=ratio, output_dir=str(tmp_path)).get_warmup_steps(steps) == expected


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    arguments = training_arguments(spec_of(config(weight_decay=0.1, lora=None), tmp_path), 10)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    layer = "model.layers.0."
    assert groups[0.0] == {
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
        "model.norm.weight",
        f"{layer}self_attn.q_proj.bias",
        f"{layer}self_attn.k_proj.bias",
        f"{layer}self_attn.v_proj.bias",
    }
    assert "model.embed_tokens.weight" in groups[0.1]
    assert len(groups[0.0]) + len(groups[0.1]) == len(names)


def spec_of(section: TrainConfig, folder: Path) -> TrainSpec:
    """A spec of which only the section counts."""
    return TrainSpec(
        packed="",
        base_model="",
        trust_remote_code=False,
        train=section.model_dump(mode="json"),
        seed=1,
        checkpoints=str(folder),
        metrics="",
    )
