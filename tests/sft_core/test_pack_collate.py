"""Packed rows train as if each sequence stood alone: same logits, same loss, deaf to their neighbours."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_core.pack import IGNORE_INDEX as NO
from sft_core.pack import Sequence
from sft_core.pack.collate import PackedCollator, PackedRows, collate

PAD = 0
VOCABULARY = 97


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def sequence_of(length: int, seed: int) -> Sequence:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
    prompt = max(1, length // 3)
    return Sequence(ids, [NO] * prompt + ids[prompt:])


ROWS = [[sequence_of(n, n) for n in (9, 1, 14)], [sequence_of(n, n) for n in (5, 7)]]
"""24 and 12 tokens: the second row is padded."""


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, rows: list[list[Sequence]]) -> torch.Tensor:
    batch = collate(rows, PAD)
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO, reduction="sum"
    )


def test_literal_batch() -> None:
    rows = [[Sequence([5, 6, 7], [NO, 6, 7]), Sequence([8, 9], [8, 9])], [Sequence([4, 3], [NO, 3])], []]
    batch = collate(rows, 1)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[NO, 6, 7, NO, 9], [NO, 3, NO, NO, NO], [NO] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_a_batch_of_empty_rows_is_one_pad_token_wide() -> None:
    assert collate([[], []], PAD)["labels"].tolist() == [[NO], [NO]]


def test_packed_logits_equal_unpacked(model: LlamaForCausalLM) -> None:
    packed = logits_of(model, ROWS)
    for number, row in enumerate(ROWS):
        start = 0
        for sequence in row:
            end = start + len(sequence.input_ids)
            torch.testing.assert_close(packed[number, start:end], logits_of(model, [[sequence]])[0], rtol=0, atol=1e-5)
            start = end


def test_sum_of_losses_packed_equals_unpacked(model: LlamaForCausalLM) -> None:
    packed = loss_sum(logits_of(model, ROWS), collate(ROWS, PAD)["labels"])
    alone = sum(loss_sum(logits_of(model, [[s]]), collate([[s]], PAD)["labels"]) for row in ROWS for s in row)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert packed > 0


def test_changing_one_document_leaves_the_others(model: LlamaForCausalLM) -> None:
    before = logits_of(model, ROWS)
    changed = [[ROWS[0][0], ROWS[0][1], sequence_of(14, 77)], [sequence_of(5, 78), ROWS[1][1]]]
    after = logits_of(model, changed)
    torch.testing.assert_close(after[0, :10], before[0, :10], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[1, 5:12], before[1, 5:12], rtol=0, atol=1e-6)
    assert (after[0, 10:] - before[0, 10:]).abs().max() > 1e-2
    assert (after[1, :5] - before[1, :5]).abs().max() > 1e-2


def test_padding_is_heard_by_nobody(model: LlamaForCausalLM) -> None:
    alone = logits_of(model, [ROWS[1]])
    torch.testing.assert_close(logits_of(model, ROWS)[1, :12], alone[0], rtol=0, atol=1e-5)


def test_dataset_and_collator() -> None:
    class Source:
        def sequence(self, index: int) -> Sequence:
            return Sequence([index, index], [NO, index])

    rows = PackedRows(Source(), [[2, 1], [3]])
    assert len(rows) == 2
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=PackedCollator(PAD))
    (batch,) = loader
    assert batch["input_ids"].tolist() == [[2, 2, 1, 1], [3, 3, 0, 0]]


def test_importing_pack_leaves_torch_alone() -> None:
    script = "import sys, sft_core.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
