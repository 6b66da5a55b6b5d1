"""Merging into the base that a 4-bit training saw: against the live 4-bit model, and the choice by measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter

XTUNER = Path(__file__).parents[3] / "shared" / "checkpoints" / "xtuner"
FULL = MergeOptions(base="full", compute_dtype="float32")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}

needs_xtuner = pytest.mark.skipif(not XTUNER.is_dir(), reason=f"XTuner's checkpoints are not at {XTUNER}")


def save_tokenizer(folder: Path, template: str | None) -> None:
    words = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "\n"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(words[:4])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in two shards, with a tokenizer that has no template."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, eos_token_id=1, **SIZES))
    model.generation_config._from_model_config = True
    model.save_pretrained(folder, max_shard_size="200KB")
    assert {path.name for path in folder.glob("*.safetensors")} == SHARDS
    save_tokenizer(folder, None)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on all linear layers, with the tokenizer of its training."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder, CHATML)
    return folder


@pytest.fixture
def altered(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the adapter with other settings or tensors."""

    def make(tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
        folder = tmp_path / "altered"
        folder.mkdir()
        config = json.loads((adapter / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        save_file(tensors or load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
        return folder

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- 4-bit base ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_base_is_the_live_4_bit_base_bit_for_bit(
    base: Path, altered: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    import bitsandbytes as bnb

    one = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    tensors = {one.format("A"): torch.ones(4, 64), one.format("B"): torch.ones(96, 4)}
    outcome = merge_adapter(
        base, altered(tensors), tmp_path / "out", MergeOptions(base="dequantized", compute_dtype=dtype)
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    live = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), quantization_config=quantization, device_map={"": "cpu"}
    )
    merged, original = weights(tmp_path / "out"), weights(base)
    quantized = {f"{name}.weight": m for name, m in live.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantized) == outcome.facts["dequantized"] == 14
    for name, tensor in merged.items():
        if name not in quantized:
            assert torch.equal(tensor, original[name]), name
            continue
        module = quantized[name]
        expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        if name == "model.layers.0.mlp.up_proj.weight":
            expected = (expected.double() + 2.0 * 4).float()
        assert torch.equal(tensor, expected), name
    assert outcome.facts["certificate"]["chosen"] == "dequantized"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "conversations"
    (folder / "heldout").mkdir(parents=True)
    turns = [("user", "abc", 0), ("assistant", "def", 1)]
    messages = [[{"role": r, "content": c * (1 + i % 5), "weight": w} for r, c, w in turns] for i in range(70)]
    table = pa.table({"row_id": [str(i) for i in range(70)], "messages": messages})
    pq.write_table(table, folder / "heldout" / "part-00000.parquet")
    return folder


@pytest.mark.slow
def test_auto_measures_both_and_keeps_the_nearer(base: Path, adapter: Path, held_out: Path, tmp_path: Path) -> None:
    options = MergeOptions(compute_dtype="float32", held_out=held_out)
    outcome = merge_adapter(base, adapter, tmp_path / "out", options)
    certificate = outcome.facts["certificate"]
    kl = {name: figures["kl"] for name, figures in certificate["candidates"].items()}
    assert certificate["certified"]
    assert certificate["chosen"] == outcome.facts["base_weights"] == "dequantized"
    assert (certificate["sequences"], certificate["tokens"] > 64 * 3) == (64, True)
    assert abs(kl["dequantized"]) < 1e-5 < kl["full"]
    assert certificate["candidates"]["dequantized"]["top1_agreement"] > 0.98
    merge_adapter(base, adapter, tmp_path / "told", MergeOptions(base="dequantized", compute_dtype="float32"))
    assert all(torch.equal(t, weights(tmp_path / "told")[name]) for name, t in weights(tmp_path / "out").items())
    assert not list(tmp_path.glob(".out-*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"certified": true' in card


def test_a_model_over_the_bound_is_refused(base: Path, adapter: Path, held_out: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"base": "full", "compute_dtype": "float32", "held_out": held_out, "certify": True}
    outcome = merge_adapter(base, adapter, tmp_path / "near", MergeOptions(**told, max_divergence=10.0))
    measured = outcome.facts["certificate"]["candidates"]["full"]["kl"]
    assert measured > 1e-5  # the full base is not the 4-bit one of the training
    merge_adapter(base, adapter, tmp_path / "at", MergeOptions(**told, max_divergence=measured))
    with pytest.raises(ModelError, match="nats a token from the model that was trained, over"):
        merge_adapter(base, adapter, tmp_path / "over", MergeOptions(**told, max_divergence=measured * 0.99))
    assert not list((tmp_path / "over").glob("*.safetensors"))


def test_auto_without_rows_takes_what_training_saw_and_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    certificate = merge_adapter(base, adapter, tmp_path / "nf4", MergeOptions()).facts["certificate"]
    assert (certificate["certified"], certificate["chosen"]) == (False, "dequantized")
    assert "no held-out rows" in certificate["why"]
    options = MergeOptions(quantization="none")
    certificate = merge_adapter(base, adapter, tmp_path / "none", options).facts["certificate"]
    assert certificate["chosen"] == "full"
