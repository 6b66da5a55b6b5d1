"""Packed attention: the masked form's logits and gradients, isolated documents, and no effect where it does not fit."""

import copy
from typing import Any

import pytest
import torch
import transformers

from sft_core.pack import Sequence
from sft_core.pack.collate import collate
from sft_core.train.attention import NAME, borders, choose_attention, use_packed_attention
from sft_core.train.isolation import check_isolation
from tests.sft_core.architectures import SMALL, VOCABULARY


def tiny(kind: str, implementation: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | more))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float()


def packed_twin(model: Any) -> Any:
    """The same weights under packed attention, with a configuration of its own."""
    twin = copy.deepcopy(model)
    chosen, reason = use_packed_attention(twin)
    assert (chosen, bool(reason)) == (NAME, True)
    assert model.config._attn_implementation == "sdpa"
    return twin


def rows_of(*lengths: list[int]) -> dict[str, torch.Tensor]:
    """A batch of packed rows; the shorter ones padded."""
    generator = torch.Generator().manual_seed(1)
    ids = [[torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in row] for row in lengths]
    return collate([[Sequence(one, list(one)) for one in row] for row in ids], 0)


@pytest.mark.parametrize("rows", [[[9, 1, 14]], [[24]], [[9, 1, 14], [5, 7]], [[6], []]], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite", "olmo2", "mixtral"])
def test_logits_and_gradients_are_those_of_the_masked_form(kind: str, rows: list[list[int]]) -> None:
    masked = tiny(kind)
    packed = packed_twin(masked)
    batch = rows_of(*rows)
    expected, found = (model(**batch, use_cache=False) for model in (masked, packed))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for (name, one), (_, other) in zip(masked.named_parameters(), packed.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_knows_the_borders_too() -> None:
    plain = packed_twin(tiny("llama")).train()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, again):
        model(**rows_of([9, 1, 14]), use_cache=False).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("adapter", [False, True])
def test_the_isolation_probe_passes(adapter: bool) -> None:
    import peft

    model = tiny("llama")
    if adapter:
        lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    use_packed_attention(model)
    assert check_isolation(model, VOCABULARY) < 1e-6


@torch.no_grad()
def test_padded_batches_and_generation_stay_as_they_were() -> None:
    masked = tiny("llama").eval()
    packed = packed_twin(masked)
    ids = rows_of([12], [12])["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # padded on the left, as for generation
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        expected, found = (model(**inputs).logits for model in (masked, packed))
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
        texts = [model.generate(**inputs, max_new_tokens=8, do_sample=False) for model in (masked, packed)]
        assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mistral", {"sliding_window": 16}, "sliding window of 16"),
        ("gemma3_text", {}, "layers of kind sliding_attention"),
        ("gemma2", {"implementation": "eager"}, "takes no other attention function"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout"),
        ("llama", {"head_dim": 12}, "heads of 12 numbers"),
    ],
)
def test_what_it_does_not_cover_keeps_its_own_attention(kind: str, more: dict[str, Any], why: str) -> None:
    model = tiny(kind, **more)
    before = model.config._attn_implementation
    chosen, reason = choose_attention(model)
    assert chosen == before
    assert why in reason


def test_literal_borders() -> None:
    found = borders(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 10]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 4
