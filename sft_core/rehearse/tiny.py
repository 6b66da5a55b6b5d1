"""A tiny random model of an architecture.

In: a model's configuration. Out: the same configuration shrunk, and a folder with random weights for it. Shrunk are
layers (one of each kind, two at least), widths, heads (grouped as they were) and experts. What stays: rope's settings
(with the head dimension, where they list a value for each), sliding windows, ties, the vocabulary with its special ids.
"""

import copy
from pathlib import Path
from typing import Any

HIDDEN, HEAD_DIM, INTERMEDIATE, EXPERT_INTERMEDIATE = 64, 64, 128, 64
EXPERTS, EXPERTS_A_TOKEN = 4, 2
SMALLER = {
    "intermediate_size": INTERMEDIATE,
    "ffn_dim": INTERMEDIATE,
    "n_inner": INTERMEDIATE,
    "hidden_size_per_layer_input": HIDDEN,
    "vocab_size_per_layer_input": 512,
    "moe_intermediate_size": EXPERT_INTERMEDIATE,
    "shared_expert_intermediate_size": EXPERT_INTERMEDIATE,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS_A_TOKEN,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
}
"""Keys of configurations and the most that a tiny model has of them."""


def shrink(config: Any) -> Any:
    """A tiny copy of a transformers configuration; parts of it (text, vision) are shrunk alike."""
    tiny = copy.deepcopy(config)
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    for part in getattr(tiny, "sub_configs", {}):
        inner = getattr(tiny, part, None)
        if inner is not None:
            setattr(tiny, part, shrink(inner))
    if getattr(tiny, "num_attention_heads", None):
        _shrink_heads(tiny)
        _shrink_layers(tiny)
    for key, most in SMALLER.items():
        value = getattr(tiny, key, None)
        if isinstance(value, int) and value > most:
            setattr(tiny, key, most)
    return tiny


def write_tiny_model(config: Any, out: Path, seed: int, trust_remote_code: bool = False) -> None:
    """Random weights for `config` as a model folder, without a tokenizer. What transformers raises is not caught."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.save_pretrained(out)


def _shrink_heads(config: Any) -> None:
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    own_head_dim = isinstance(vars(config).get("head_dim"), int)
    head_dim = config.head_dim if own_head_dim else max(config.hidden_size // heads, 1)
    if not _rope_lists(config):
        head_dim = min(head_dim, HEAD_DIM)
    few_heads, few_groups = (4, 2) if 1 < groups < heads else (2, 1 if groups < heads else 2)
    config.num_attention_heads = few_heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few_groups
    if own_head_dim:
        config.head_dim = head_dim
    config.hidden_size = HIDDEN if own_head_dim else few_heads * head_dim


def _rope_lists(config: Any) -> bool:
    """Whether rope's settings hold a value for each of the head's dimensions (longrope)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return any(isinstance(value, list) for value in rope.values())


def _shrink_layers(config: Any) -> None:
    """Keep the first layer of every kind, and two at least."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["layer"] * layers
    kept = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    kept = sorted([*kept, *[i for i in range(layers) if i not in kept][: max(0, 2 - len(kept))]])
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(config, key, [value[i] for i in kept])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in config.mlp_only_layers]
    config.num_hidden_layers = len(kept)
