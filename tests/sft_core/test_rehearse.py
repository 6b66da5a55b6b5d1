"""A rehearsal's parts: the tiny model keeps the architecture, the recipe stays the recipe, faults stay faults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_core.errors import ModelError, SourceError
from sft_core.recipe import BaseModelConfig, Recipe, resolve
from sft_core.rehearse import prepare_rehearsal
from sft_core.rehearse.base_model import make_tiny_base
from sft_core.rehearse.tiny import shrink, write_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# model_type, keys as the real model has them; keys of the tiny one
SHRUNK: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "llama",
        {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": LLAMA3_ROPE},
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    ("llama", {"num_attention_heads": 32, "num_key_value_heads": 32}, {"num_key_value_heads": 2}),
    (
        "gemma3_text",
        {"num_hidden_layers": 26, "num_key_value_heads": 1, "sliding_window": 512},
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "head_dim": 64,
        },
    ),
    ("mixtral", {"num_local_experts": 8}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", {"mlp_only_layers": [1, 5], "head_dim": 128}, {"num_experts": 4, "mlp_only_layers": [1]}),
    ("deepseek_v3", {}, {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_hidden_layers": 2}),
    (
        "phi3",
        {
            "num_attention_heads": 32,
            "hidden_size": 3072,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "partial_rotary_factor": 1.0,
            },
        },
        {"hidden_size": 192, "num_attention_heads": 2},
    ),
]


@pytest.mark.parametrize(("model_type", "real", "tiny"), SHRUNK)
def test_a_tiny_model_keeps_its_architecture(
    model_type: str, real: dict[str, Any], tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=2, **real)
    before = config.to_dict()
    shrunk = shrink(config)
    assert config.to_dict() == before
    assert {key: getattr(shrunk, key) for key in tiny} == tiny
    for key in ("vocab_size", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"):
        assert getattr(shrunk, key) == getattr(config, key), key
    write_tiny_model(shrunk, tmp_path, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(AutoModelForCausalLM.from_config(shrunk))
    assert sum(weight.numel() for weight in model.parameters()) < 3e6
    assert torch.isfinite(model(input_ids=torch.arange(3, 40)[None]).logits).all()


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    config = shrink(AutoConfig.for_model("llama", vocab_size=64))
    for folder in ("a", "b"):
        torch.rand(3)
        write_tiny_model(config, tmp_path / folder, seed=7)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_local_model_gives_its_tokenizer_byte_for_byte_and_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    base = make_tiny_base(BaseModelConfig(path=str(tiny_model)), None, [], 5, tmp_path / "base")
    assert base.stand_in is None
    assert base.real_config.hidden_size == 64
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (base.folder / name).read_bytes() == (tiny_model / name).read_bytes()
    assert (base.folder / "model.safetensors").read_bytes() != (tiny_model / "model.safetensors").read_bytes()


def test_a_model_with_code_of_its_own_is_rehearsed_with_that_code(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    base = make_tiny_base(BaseModelConfig(path=str(source), trust_remote_code=True), None, [], 0, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base.folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    with pytest.raises(ModelError, match="no tiny model of this architecture"):
        make_tiny_base(BaseModelConfig(path=str(source)), None, [], 0, tmp_path / "refused")


@pytest.mark.parametrize(
    ("path", "words"), [("./no-such-folder", "no such folder"), ("EMPTY", "no config.json"), ("a/b/c", "not a hub id")]
)
def test_a_wrong_base_model_is_no_reason_for_a_stand_in(path: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "EMPTY"
    folder.mkdir()
    with pytest.raises(ModelError, match=words):
        make_tiny_base(BaseModelConfig(path=path.replace("EMPTY", str(folder))), None, [], 0, tmp_path / "base")


STAND_INS = [
    ("meta-llama/Llama-3.1-8B-Instruct", "llama", ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]),
    ("google/gemma-3-1b-it", "gemma3_text", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    ("Qwen/Qwen3-8B", "qwen3", ["<|im_start|>", "<|im_end|>"]),
    ("Qwen/Qwen3-30B-A3B", "qwen3_moe", ["<|im_end|>"]),
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", ["<s>", "</s>"]),
    ("mistralai/Mistral-7B-Instruct-v0.3", "mistral", ["<s>", "</s>"]),
    ("internlm/internlm2-chat-7b", "llama", ["<|im_start|>", "<|im_end|>"]),
    ("nobody/knows", "llama", ["<|im_start|>", "<|mine|>"]),
]


@pytest.mark.parametrize(("name", "model_type", "special"), STAND_INS)
def test_without_the_hub_a_model_of_the_same_family_stands_in(
    name: str, model_type: str, special: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = make_tiny_base(BaseModelConfig(path=name), "{{ '<|mine|>' }}", ["abc " * 9] * 3, 0, tmp_path / "base")
    assert "hub cannot be reached" in (base.stand_in or "")
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    config = AutoConfig.from_pretrained(base.folder)
    assert (config.model_type, config.vocab_size) == (model_type, len(tokenizer))
    for token in special:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1, token
    assert tokenizer.decode(tokenizer("où? 漢字", add_special_tokens=False).input_ids) == "où? 漢字"


def small_recipe(tiny_model: Path, rows: Path, **sections: Any) -> Recipe:
    values = {"name": "small", "base_model": {"path": str(tiny_model)}, "datasets": [{"path": str(rows)}]}
    return resolve({**values, "pack": {"chat_template": "chatml"}, **sections})


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"input": f"ask {i}", "output": f"say {i}"}) + "\n" for i in range(count)))
    return path


def test_a_rehearsal_changes_what_it_must_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "deepspeed.json"
    config.write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, "train_batch_size": 64})
    )
    recipe = small_recipe(
        tiny_model,
        write_rows(tmp_path / "rows.jsonl", 30),
        train={
            "dtype": "float16",
            "deepspeed": str(config),
            "lora": {"init_lora_weights": "loftq", "r": 8},
            "gradient_accumulation_steps": 16,
            "num_processes": 4,
        },
        compute={"train": "train/gpu"},
        evaluate={"harness_tasks": ["arc_easy"]},
    )
    rehearsal = prepare_rehearsal(recipe, tmp_path / "scratch", on_line=lambda _: None)
    before, after = flat(recipe.as_dict()), flat(rehearsal.recipe.as_dict())
    assert {key for key in before | after if before.get(key) != after.get(key)} == {
        "store",
        "base_model.path",
        "datasets",
        "eval_fraction",
        "max_quarantined_fraction",
        "train.dtype",
        "train.deepspeed",
        "train.lora.init_lora_weights",
        "train.max_steps",
        "train.gradient_accumulation_steps",
        "train.num_processes",
        "train.save_steps",
        "train.logging_steps",
        "evaluate.max_new_tokens",
        "evaluate.max_generated_rows",
        "evaluate.harness_tasks",
        "register.min_heldout_rows",
        "compute.train",
        "compute.num_proc",
    }
    assert (after["train.dtype"], after["train.lora.init_lora_weights"], after["compute.train"]) == (
        "bfloat16",
        True,
        None,
    )
    written = json.loads(Path(after["train.deepspeed"]).read_text())
    assert written["zero_optimization"] == {"stage": 2}
    assert (written["fp16"], written["bf16"]) == ({"enabled": False}, {"enabled": True})
    assert written["train_batch_size"] == "auto"
    said = "\n".join(rehearsal.replaced)
    for words in ("float16 -> bfloat16", "loftq", "train/gpu", "arc_easy", "30 of 30"):
        assert words in said


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_a_source_that_cannot_be_reached_is_named_and_rows_can_stand_in(tiny_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model, tmp_path / "gone.jsonl")
    with pytest.raises(SourceError, match=r"gone\.jsonl.*--rehearse-rows FILE"):
        prepare_rehearsal(recipe, tmp_path / "one", on_line=lambda _: None)
    stand_in = write_rows(tmp_path / "mine.jsonl", 20)
    rehearsal = prepare_rehearsal(recipe, tmp_path / "two", [stand_in], on_line=lambda _: None)
    assert Path(rehearsal.recipe.datasets[0].path).read_text() == stand_in.read_text()
    assert any("cannot be reached" in line for line in rehearsal.replaced)
