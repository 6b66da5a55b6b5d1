"""Correctness on the device at hand, after `train_gpu.py` has measured: isolation, and equality of a resumed run.

In: a preset and a method; the resume check trains a toy model through `train_adapter`'s real child process. Out: a line
each; an AssertionError where a check fails.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

MAX_STEPS = 6
STOP_AFTER = 3


def check_isolated(preset: Any, method: str, device: Any) -> str:
    """The worker's own probe, on the quickest attention of this device; TrainError if documents see each other."""
    from train_gpu_model import VARIANTS, autocast, ready_model

    from sft_core.train.isolation import check_isolation

    chosen = tuple(name for name in VARIANTS if name in ("no-checkpointing", "loss", "attention"))
    ready = ready_model(preset, method, chosen, device)
    with autocast(device):
        change = check_isolation(ready.model, preset.config["vocab_size"])
    return f"neighbours move by {change:.1e} of their size ({ready.notes[0]})"


def check_resume(method: str, device: Any) -> str:
    """A run stopped after a checkpoint and resumed ends with the same adapter bytes as a straight one."""
    from train_gpu_model import PRESETS

    with tempfile.TemporaryDirectory(prefix="sft-resume-") as name:
        folder = Path(name)
        model, packed = _toy_model(folder / "model", PRESETS["toy"]), folder / "packed"
        _pack(folder, model, packed)
        straight = _trained(folder / "straight", packed, model, method, device, stops=False)
        resumed = _trained(folder / "resumed", packed, model, method, device, stops=True)
    assert straight == resumed, f"a resumed run differs: {straight[:12]} straight, {resumed[:12]} resumed"
    return f"equal adapters, SHA-256 {straight[:12]}"


def _trained(folder: Path, packed: Path, model: Path, method: str, device: Any, stops: bool) -> str:
    """SHA-256 of the adapter after `MAX_STEPS` steps; `stops` ends the child in the middle and starts over."""
    from sft_core.convert import convert_checkpoint
    from sft_core.recipe import LoraConfig, TrainConfig
    from sft_core.train import TrainInputs, train_adapter

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    config = TrainConfig(
        quantization="nf4" if method == "qlora" else "none",
        lora=lora,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        max_steps=MAX_STEPS,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        save_steps=2,
        logging_steps=1,
        num_processes=1,
    )
    inputs = TrainInputs(packed=packed, base_model=model, trust_remote_code=False, work=folder / "work")

    class StoppedError(Exception):
        """Ends the child: `train_adapter` leaves none behind."""

    def stop(line: str) -> None:
        if line.startswith(f"step {STOP_AFTER}/"):
            raise StoppedError

    if stops:
        try:
            train_adapter(inputs, config, 7, folder / "first", stop)
        except StoppedError:
            left = sorted(path.name for path in (folder / "work").glob("checkpoint-*"))
            assert left, "no checkpoint to resume from"
            assert f"checkpoint-{MAX_STEPS}" not in left, "it was not stopped before the end"
        else:
            raise AssertionError("the run was not stopped")
    lines: list[str] = []
    train_adapter(inputs, config, 7, folder / "out", lines.append)
    assert stops == any(line.startswith("resuming ") for line in lines), lines
    convert_checkpoint(folder / "out" / "checkpoint", folder / "adapter", lora, str(model))
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _toy_model(folder: Path, preset: Any) -> Path:
    """Weights, and a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**preset.config, **tokens)).save_pretrained(folder)
    return folder


def _pack(folder: Path, model: Path, out: Path) -> None:
    from prepare import write_conversations

    from sft_core.pack import pack_dataset
    from sft_core.recipe import PackConfig

    rows = [{"instruction": f"say w{n * 7919 % 10007}", "output": f"w{n * 7919 % 10007}!"} for n in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    conversations = write_conversations(folder / "rows", len(rows), folder / "rows.json")
    pack_dataset(conversations, model, PackConfig(max_length=160, chat_template="chatml"), 42, out)
