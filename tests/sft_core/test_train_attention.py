"""Packed attention: the masked form's logits and gradients, isolated documents, and no effect where it does not fit."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sft_core.pack import Sequence
from sft_core.pack.collate import collate
from sft_core.train import attention
from sft_core.train.attention import NAME, borders, choose_attention, document_ends, use_packed_attention, varlen_kernel
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
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_padded_batches_and_generation_stay_as_they_were(kind: str) -> None:
    """Windows hold without borders and with a cache too."""
    masked = tiny(kind, **WINDOWED.get(kind, {})).eval()
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
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8}, "layers of kind chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention in both directions"),
        ("bert", {}, "attention in both directions"),
        ("exaone4", {"sliding_window": 5, "sliding_window_pattern": 2}, "that its configuration does not give it"),
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
    ends = document_ends(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert ends.tolist() == [0, 3, 5, 6, 10]
    assert ends.dtype == torch.int32
    found = borders(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 10]
    assert found["max_length_q"] == found["max_length_k"] == 5  # of a row: no document is longer


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 1.0},
    "starcoder2": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Two layers; documents of more than 5 tokens show the window."""


@pytest.mark.parametrize("rows", [[[9, 1, 14]], [[9, 1, 14], [5, 7]]], ids=str)
@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_are_those_of_the_masked_form(kind: str, rows: list[list[int]]) -> None:
    masked = tiny(kind, **WINDOWED[kind])
    packed, whole = packed_twin(masked), packed_twin(tiny(kind, **WINDOWED[kind] | {"sliding_window": 100}))
    whole.load_state_dict(masked.state_dict())
    batch = rows_of(*rows)
    expected, found, unwindowed = (model(**batch, use_cache=False) for model in (masked, packed, whole))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert (unwindowed.logits - expected.logits).abs().max() > 1e-3  # the window is at stake here
    expected.loss.backward()
    found.loss.backward()
    for (name, one), (_, other) in zip(masked.named_parameters(), packed.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def reference(query: Any, key: Any, value: Any, ends: Any, scale: float, left: int) -> torch.Tensor:
    """What FlashAttention's kernel computes: grouped heads, causal, `left` tokens behind at most (-1: all)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    outputs = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & ((behind <= left) if left >= 0 else torch.tensor(True))
        outputs.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[start:end])
        )
    return torch.cat(outputs)


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # noqa: PLR0913
    raise AssertionError("never to be called: it knows neither windows nor a scale")


def of_torch_2_11(  # noqa: PLR0913
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0, "causal"
    return reference(query, key, value, cu_seq_q, scale, window_size[0])


def of_torch_2_13(  # noqa: PLR0913
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1]), "else it raises"
    return of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Put a `varlen_attn` in the place of torch's, on a machine that seems to have an H100."""

    def put(function: Any) -> None:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
        varlen_kernel.cache_clear()

    yield put
    varlen_kernel.cache_clear()


@pytest.mark.parametrize("version", [of_torch_2_11, of_torch_2_13])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_gets_what_the_installed_torch_takes(version: Any, window: int | None, install: Any) -> None:
    install(version)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = tiny("llama").model.layers[0].self_attn  # 4 heads of queries, 2 of keys
    found = attention._varlen(module, [query, key, value], (ends, 9), window, 0.3)
    expected = attention._by_document(module, [query, key, value], ends, window, 0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("version", "chosen", "why"),
    [
        (of_torch_2_10, "sdpa", "its torch.nn.attention.varlen takes no scale and no window_size"),
        (of_torch_2_11, NAME, "torch.nn.attention.varlen"),
        (of_torch_2_13, NAME, "torch.nn.attention.varlen"),
    ],
)
def test_a_torch_without_windows_keeps_sdpa_and_says_why(version: Any, chosen: str, why: str, install: Any) -> None:
    install(version)
    model = tiny("llama").bfloat16()
    model.config.dtype = torch.bfloat16
    model.get_input_embeddings().weight.ds_id = 0  # as under ZeRO-3, which keeps weights elsewhere
    found, reason = choose_attention(model)
    assert found == chosen
    assert why in reason


def test_the_installed_torch_has_what_is_asked_of_it() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def test_a_layers_window_is_its_configurations() -> None:
    gemma, mistral, llama = (
        [attention.window_of(layer.self_attn) for layer in tiny(kind, **more | {"sliding_window": 7}).model.layers]
        for kind, more in (("gemma3_text", WINDOWED["gemma3_text"]), ("mistral", {}), ("llama", {}))
    )
    assert gemma == [7, None]
    assert mistral == [7, 7]
    assert llama == [None, None]  # left over in a config.json: a Llama has no windows
    assert attention.window_of(torch.nn.Module()) is None


@pytest.mark.parametrize("kind", ["llama", "apertus"])
def test_a_window_that_the_model_does_not_know_changes_nothing(kind: str) -> None:
    masked = tiny(kind, sliding_window=5)
    batch = rows_of([9, 1, 14])
    expected, found = (model(**batch, use_cache=False).logits for model in (masked, packed_twin(masked)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_window_in_code_of_the_models_own_is_left_to_it() -> None:
    class Foreign(torch.nn.Module):
        _supports_attention_backend = _supports_sdpa = True

        def get_decoder(self) -> torch.nn.Module:
            return self

    config = SimpleNamespace(sliding_window=5, hidden_size=32, num_attention_heads=4)
    assert attention._not_covered(Foreign(), config) == "a sliding window of 5 tokens in code of the model's own"
