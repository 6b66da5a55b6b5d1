"""Which modules get an adapter: the names, as they are in tiny models of several families."""

from typing import Any

import pytest
import torch
import transformers

from sft_core.convert.skeleton import peft_config
from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig
from sft_core.train.targets import adapted_modules, check_modules_to_save, fused_experts

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
SHARED = [f"model.layers.0.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
EXPERTS = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
MODELS: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "llama": ("Llama", {}, ATTENTION + MLP, []),
    "gemma": ("Gemma", {}, ATTENTION + MLP, []),
    "gemma2": ("Gemma2", {}, ATTENTION + MLP, []),
    "mixtral": ("Mixtral", {"num_local_experts": 2}, ATTENTION, EXPERTS),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 2, "moe_intermediate_size": 8}, ATTENTION, EXPERTS),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        ATTENTION + SHARED,
        EXPERTS,
    ),
}
"""Family -> class, own keys, modules that all-linear adapts, weights it cannot."""


def build(family: str) -> Any:
    """A random model of one layer."""
    name, extra, *_ = MODELS[family]
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL, **extra))


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_names_every_layer_but_head_and_router(family: str) -> None:
    model = build(family)
    *_, expected, fused = MODELS[family]
    assert sorted(adapted_modules(model, LoraConfig())) == sorted(expected)
    assert fused_experts(model)[0] == fused


@pytest.mark.parametrize("family", MODELS)
def test_peft_adapts_exactly_the_modules_named(family: str) -> None:
    from peft import get_peft_model

    lora = LoraConfig(r=2)
    model = build(family)
    names = adapted_modules(model, lora)
    adapted = get_peft_model(model, peft_config(lora, names))
    found = {name for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert found == {f"base_model.model.{name}.lora_A.default.weight" for name in names}


def test_a_router_that_is_a_linear_layer_is_left_alone() -> None:
    class Layer(torch.nn.Module):
        """The names routers have had in Mixtral, Qwen2-MoE and Granite."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.shared_expert_gate, self.gate_proj = (torch.nn.Linear(2, 2) for _ in range(3))
            self.router = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})

        def get_output_embeddings(self) -> None:
            """No head."""

    assert adapted_modules(Layer(), LoraConfig()) == ["gate_proj"]


def test_named_targets_are_endings_or_one_regular_expression() -> None:
    model = build("llama")
    assert adapted_modules(model, LoraConfig(target_modules=("q_proj", "self_attn.v_proj"))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert adapted_modules(model, LoraConfig(target_modules=r".*mlp\.(up|down)_proj")) == MLP[1:]
    with pytest.raises(RecipeError, match=r"target_modules: 'query' names no module of this model; it has .*q_proj"):
        adapted_modules(model, LoraConfig(target_modules=("q_proj", "query")))


def test_a_module_trained_whole_gets_no_adapter_too() -> None:
    lora = LoraConfig(modules_to_save=("down_proj",))
    assert sorted(adapted_modules(build("llama"), lora)) == sorted(ATTENTION + MLP[:2])
    check_modules_to_save(build("llama"), lora)
    with pytest.raises(RecipeError, match="modules_to_save: 'wte' names no module"):
        check_modules_to_save(build("llama"), LoraConfig(modules_to_save=("wte",)))
