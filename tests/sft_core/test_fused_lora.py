"""LoRA by addmm against PEFT's own forward: losses, gradients of A and B, whole runs; and what is left to PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sft_core.recipe import TrainConfig
from sft_core.train.attention import use_packed_attention
from sft_core.train.fused_lora import fuse_lora
from sft_core.train.loss import supervised_loss
from sft_core.train.model import load_trainable
from tests.sft_core.train_runs import assert_same_run, config, train_here

SAME = 1e-6
"""Relative, in float32."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, dropout": {"lora": {"lora_dropout": 0.2}},
    "qlora": {"quantization": "nf4"},
    "qlora, dropout": {"quantization": "nf4", "lora": {"lora_dropout": 0.2}},
    "rslora": {"lora": {"use_rslora": True}},
    "recomputed": {"gradient_checkpointing": True, "lora": {"lora_dropout": 0.2}},
    "head trained whole": {"lora": {"modules_to_save": ["lm_head"]}},
    "some layers": {"lora": {"target_modules": ["q_proj", "down_proj"]}},
}


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen 2: biases in three of its linear layers."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, eos_token_id=2, bos_token_id=None)).save_pretrained(folder)
    return folder


def trainable(model: Path, section: TrainConfig) -> Any:
    """As training builds it, with an update that is not zero, and biases."""
    trained, _ = load_trainable(model, section, trust_remote_code=False)
    use_packed_attention(trained)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name or name.endswith("_proj.base_layer.bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    if section.gradient_checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained.train()


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Of two rows, each of two documents; dropout drawn from one seed."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (2, 40), generator=generator)
    positions = torch.arange(20).repeat(2)[None].expand(2, -1)
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
    torch.manual_seed(5)
    loss = supervised_loss(model, batch, None, "selected")
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("base", ["tiny_model", "biased_model"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_pefts(method: str, base: str, request: pytest.FixtureRequest) -> None:
    model = trainable(request.getfixturevalue(base), config(**METHODS[method]))
    loss, gradients = loss_and_gradients(model)
    layers = 4 if method == "some layers" else 14
    assert fuse_lora(model) == f"LoRA by addmm in {layers} of {layers} layers"
    found, by_addmm = loss_and_gradients(model)
    assert found == pytest.approx(loss, rel=SAME)
    assert by_addmm.keys() == gradients.keys()
    assert len([name for name in gradients if "lora_" in name]) == 2 * layers
    worst = max(difference(by_addmm[name], gradient) for name, gradient in gradients.items())
    assert worst < SAME, worst


def test_under_autocast_it_is_peft_but_for_half_precision(tiny_model: Path) -> None:
    for quantization in ("none", "nf4"):
        model = trainable(tiny_model, config(quantization=quantization, dtype="bfloat16"))
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(model)
            fuse_lora(model)
            found, by_addmm = loss_and_gradients(model)
        assert found == pytest.approx(loss, rel=2e-2)
        assert max(difference(by_addmm[name], gradient) for name, gradient in gradients.items()) < 5e-2
        assert {gradient.dtype for gradient in by_addmm.values()} == {torch.float32}


def test_what_is_more_than_a_plain_update_is_left_to_peft(tiny_model: Path) -> None:
    model = trainable(tiny_model, config(lora={"use_dora": True}))
    loss, gradients = loss_and_gradients(model)
    assert fuse_lora(model) == "LoRA by addmm in 0 of 14 layers"
    found, again = loss_and_gradients(model)
    assert found == loss
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_a_disabled_adapter_and_evaluation_are_pefts_own(tiny_model: Path) -> None:
    model = trainable(tiny_model, config())
    ids = torch.arange(3, 20)[None]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            return [plain, model(input_ids=ids, use_cache=False).logits]

    before = outputs()
    fuse_lora(model)
    assert all(torch.equal(found, expected) for found, expected in zip(outputs(), before, strict=True))
    assert not torch.equal(*before)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_whole_run_trains_the_same(quantization: str, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    runs = [
        train_here(packed, tiny_model, tmp_path / str(fused), config(quantization=quantization, fused_lora=fused))
        for fused in (True, False)
    ]
    assert_same_run(*runs)
