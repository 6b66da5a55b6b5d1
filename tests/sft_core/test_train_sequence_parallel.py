"""Ranks that share each packed row train as one rank does that has it alone."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from sft_core.errors import RecipeError
from sft_core.train import attention
from sft_core.train.limits import check_training
from sft_core.train.sequence_parallel import AcrossRanks, SharedBatches
from tests.sft_core.train_runs import assert_same_run, config, train, train_here

SHARED: dict[str, dict[str, Any]] = {
    "lora, two groups of two": {"num_processes": 4, "deepspeed": "zero2"},
    "all weights, zero3": {"lora": None, "deepspeed": "zero3", "gradient_checkpointing": True},
    "held-out loss, batches of two, a window": {"eval_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # up to four ranks
@pytest.mark.parametrize("kind", SHARED)
def test_two_ranks_that_share_rows_equal_one(kind: str, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    shared = config(max_steps=3, **{"num_processes": 2, **SHARED[kind]}, sequence_parallel_size=2)
    groups = (shared.num_processes or 0) // 2
    alone = {"num_processes": 1, "sequence_parallel_size": 1, "gradient_accumulation_steps": 4 * groups}
    alone |= {"deepspeed": None}  # which changes nothing: test_train_equal.py
    base = with_window(tiny_model, tmp_path / "base") if "window" in kind else tiny_model
    expected = train_here(packed, base, tmp_path / "alone", shared.model_copy(update=alone))
    assert_same_run(train(packed, base, tmp_path / "shared", shared), expected)


def with_window(model: Path, folder: Path) -> Path:
    """The same weights as a Mistral: a token sees the 7 before it alone."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_parts_laid_end_to_end_are_the_row_and_each_token_keeps_its_target() -> None:
    batch = {
        "input_ids": torch.tensor([[10, 11, 12, 20, 21]]),
        "labels": torch.tensor([[-100, 11, 12, -100, 21]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    first, second = (AcrossRanks(2, rank, None).part(batch, pad_token_id=7) for rank in (0, 1))
    expected = {  # a sixth token fills the row: a document of its own, untrained
        "input_ids": [[10, 11, 12, 20, 21, 7]],
        "labels": [[-100, 11, 12, -100, 21, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0]],
        "shift_labels": [[11, 12, -100, 21, -100, -100]],
    }
    assert {name: torch.cat([first[name], second[name]], dim=1).tolist() for name in first} == expected


def test_ranks_of_a_group_get_the_same_rows_and_groups_get_all() -> None:
    order = list(SharedBatches(rows=8, batch_size=2, times=2))
    batches = [order[start : start + 2] for start in range(0, len(order), 2)]  # accelerate deals them out in turn
    by_rank = [batches[rank::4] for rank in range(4)]
    assert len(order) == len(SharedBatches(8, 2, 2)) == 16
    assert by_rank[0] == by_rank[1] == [[0, 1], [4, 5]]
    assert by_rank[2] == by_rank[3] == [[2, 3], [6, 7]]


SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 16}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (partial(LlamaConfig, num_attention_heads=3, num_key_value_heads=3), "num_attention_heads 3, which 2 ranks"),
        (partial(LlamaConfig, num_attention_heads=2, num_key_value_heads=1), "num_key_value_heads 1, which 2 ranks"),
        (
            partial(MixtralConfig, num_attention_heads=2, num_key_value_heads=2, output_router_logits=True),
            "the router's loss .* is one of whole rows",
        ),
    ],
)
def test_a_model_whose_rows_cannot_be_shared_is_refused(
    architecture: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "across_ranks", lambda size: AcrossRanks(size, 0, None))  # no second rank is there
    model = AutoModelForCausalLM.from_config(architecture(**SMALL))
    with pytest.raises(RecipeError, match=f"train.sequence_parallel_size 2: .*{message}"):
        attention.use_packed_attention(model, sequence_parallel_size=2)


def test_ranks_that_make_no_whole_groups_and_noise_by_length_are_refused() -> None:
    with pytest.raises(RecipeError, match="sequence_parallel_size 2 with 3 ranks: .* a multiple of 2"):
        check_training(config(sequence_parallel_size=2), 3)
    with pytest.raises(RecipeError, match="sequence_parallel_size 2 with neftune_noise_alpha"):
        check_training(config(sequence_parallel_size=2, neftune_noise_alpha=5.0), 2)
    assert check_training(config(sequence_parallel_size=2), 4) == []
