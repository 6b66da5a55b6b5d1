"""What tests of merge begin with: a random Llama in two shards, adapters on it, and how to read a merged folder."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def save_tokenizer(folder: Path, template: str | None) -> None:
    """One token a letter; template's control tokens."""
    words = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "\n"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(words[:4])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_base(folder: Path) -> Path:
    """A random Llama in two shards, with a tokenizer that has no template."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, eos_token_id=1, **SIZES))
    model.generation_config._from_model_config = True
    model.save_pretrained(folder, max_shard_size="200KB")
    assert {path.name for path in folder.glob("*.safetensors")} == SHARDS
    save_tokenizer(folder, None)
    return folder


def save_adapter(base: Path, folder: Path) -> Path:
    """A random adapter on all linear layers, with the tokenizer of its training."""
    torch.manual_seed(1)
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder, CHATML)
    return folder


def altered(adapter: Path, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """A copy of the adapter with other settings or tensors."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    save_file(tensors or load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
