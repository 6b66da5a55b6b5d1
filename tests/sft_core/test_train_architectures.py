"""Each architecture that a recipe is shipped for, at toy size: trained, converted, merged, and compared with the model
that was trained. In this process and with plain checkpoints; DeepSpeed's are in other tests."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.pack import load_packed
from sft_core.recipe import TrainConfig
from sft_core.train.arguments import training_arguments
from sft_core.train.attention import use_packed_attention
from sft_core.train.loss import choose_loss
from sft_core.train.model import load_trainable
from sft_core.train.run_log import RunLog
from sft_core.train.spec import TrainSpec
from sft_core.train.stream import PackedStream
from sft_core.train.trainer import PackedTrainer
from sft_core.train.watch import StepWatch
from tests.sft_core.train_runs import config

STEPS = 3
TOLERANCE = 2e-5
"""Of logits of size 1, in float32."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=None),
    "gemma3": lambda **sizes: Gemma3TextConfig(
        **sizes, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": lambda **sizes: MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
}
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "qlora": {"quantization": "nf4"}, "full": {"lora": None}}
PAIRS = [(name, method) for name in ARCHITECTURES for method in METHODS if name != "mixtral" or method != "qlora"]
"""Mixtral's experts are no linear layers: nf4 leaves them, and there is nothing new to see."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The live model, what trained it, and its folders."""

    model: Any
    section: TrainConfig
    base: Path
    checkpoint: Path


def make_base(folder: Path, architecture: str, tokenizer: Path) -> Path:
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](vocab_size=len(words), **SIZES))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=PAIRS, ids="-".join)
def trained(request: pytest.FixtureRequest, packed: Path, tiny_model: Path, tmp_path: Path) -> Trained:
    """What a rank does between its start and its end, here."""
    architecture, method = request.param
    base = make_base(tmp_path / "base", architecture, tiny_model)
    section = config(**METHODS[method], max_steps=STEPS, learning_rate=3e-3)
    spec = TrainSpec(
        packed=str(packed),
        base_model=str(base),
        trust_remote_code=False,
        train=section.model_dump(mode="json"),
        seed=7,
        checkpoints=str(tmp_path / "work"),
        metrics=str(tmp_path / "metrics.jsonl"),
    )
    rows = load_packed(packed)
    stream = PackedStream(rows, section.num_train_epochs, section.per_device_train_batch_size)
    torch.manual_seed(7)
    model, _ = load_trainable(base, section, trust_remote_code=False)
    use_packed_attention(model)
    log = RunLog(spec, STEPS, packs=True)
    arguments, watch = training_arguments(spec, STEPS), StepWatch(rows, stream, None)
    trainer = PackedTrainer(model, arguments, stream, watch, log, choose_loss(model)[0])
    log.start(None, speaks=False)
    trainer.train()
    shutil.copytree(base, tmp_path / "published")  # as it was, should anything write to the base
    return Trained(trainer.model, section, tmp_path / "published", tmp_path / "work" / f"checkpoint-{STEPS}")


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 60).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return found


@pytest.mark.slow
def test_the_merged_model_is_the_trained_one(trained: Trained, tmp_path: Path) -> None:
    section, base, out = trained.section, trained.base, tmp_path / "out"
    live = logits(trained.model)
    before = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert float((live - before).abs().max()) > 1000 * TOLERANCE
    options = ConvertOptions(
        base=base,
        tokenizer=base,
        dtype="float32" if section.lora is None else None,
        quantization={"quantization": section.quantization, "compute_dtype": "float32"},
    )
    convert_checkpoint(trained.checkpoint, out, section.lora, "some/base", options)
    if section.lora is not None:
        adapter, out = out, tmp_path / "merged"
        merge_base = "full" if section.quantization == "none" else "dequantized"
        merge_adapter(base, adapter, out, MergeOptions(base=merge_base))  # type: ignore[arg-type]
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=TOLERANCE)
    assert type(merged) is type(AutoModelForCausalLM.from_pretrained(base))
    assert names(out) == names(base)


def names(folder: Path) -> set[str]:
    """Of the tensors in a model's files."""
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.slow
@pytest.mark.parametrize("trained", [("mixtral", "full")], indirect=True)
def test_mixtrals_experts_are_all_trained_and_saved_one_by_one(trained: Trained, tmp_path: Path) -> None:
    options = ConvertOptions(base=trained.base, tokenizer=trained.base, dtype="float32")
    convert_checkpoint(trained.checkpoint, tmp_path / "out", None, "some/base", options)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained.base, tmp_path / "out"))
    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
        for layer in range(2)
        for expert in range(4)
        for part in ("w1", "w2", "w3")
    }
    assert {name for name in after if ".experts." in name} == experts
    assert all(after[name].shape == before[name].shape and not torch.equal(after[name], before[name]) for name in after)
