"""The product on the device of `gpu_check.py`: its training child, stopped and resumed, and what comes after.

In: a bench. Out: lines of speed, memory and equality. The model has the preset's width and few layers, random weights,
and a tokenizer of one token a byte; documents are of some 500 tokens, so that attention works over several blocks.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check_bench import Bench

MAX_STEPS, SAVE_STEPS, STOP_AFTER = 6, 2, 3
LAYERS = 8


class StoppedError(Exception):
    """Ends the child: `train_adapter` leaves none behind."""


def product(bench: Bench) -> dict[str, Any]:
    """Two straight runs (one at toy size), one stopped and resumed, one that chooses its split; then convert, merge,
    evaluate, chat."""
    from sft_core.recipe import TrainConfig

    rig = _Rig(bench)
    plain = TrainConfig(
        max_steps=MAX_STEPS,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=SAVE_STEPS,
        num_processes=1,
        dtype="bfloat16",
    )
    found: dict[str, Any] = {}
    hashes = {name: rig.train(name, plain) for name in ("first", "second")[: 1 if bench.toy else 2]}
    hashes["resumed"] = rig.train("resumed", plain, stops=True)
    found["same_bits"] = {name: digest == hashes["first"] for name, digest in hashes.items() if name != "first"}
    auto = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto", "gradient_accumulation_steps": 4}
    rig.train("auto", plain.model_copy(update=auto))
    for name, step in rig.steps().items():
        if bench.is_over():
            bench.say("product", step=name, left_out="the time was up")
            continue
        bench.forget_peak()
        started = time.perf_counter()
        facts = step()
        seconds = round(time.perf_counter() - started, 1)
        bench.say("product", step=name, facts=facts, seconds=seconds, peak_gib=bench.peak_gib())
    return found


class _Rig:
    """Model, rows and folders."""

    def __init__(self, bench: Bench) -> None:
        from prepare import write_conversations

        from sft_core.pack import pack_dataset
        from sft_core.recipe import LoraConfig, PackConfig

        self.bench, self.folder = bench, bench.folder / "product"
        self.row_tokens = 128 if bench.toy else 4096
        self.folder.mkdir()
        self.lora = LoraConfig()
        self.model = self.folder / "model"
        layers = 2 if bench.toy else LAYERS
        _write_model(self.model, {**bench.preset.config, "num_hidden_layers": layers}, bench.device)
        words = 9 if bench.toy else 90
        rows = [
            {"instruction": f"say w{n}", "output": " ".join(f"w{(n + i) * 7919 % 10007}" for i in range(words))}
            for n in range(60 if bench.toy else 240)
        ]
        (self.folder / "rows.json").write_text(json.dumps(rows), "utf-8")
        self.conversations = write_conversations(self.folder / "rows", len(rows), self.folder / "rows.json")
        shutil.copytree(self.conversations / "train", self.conversations / "heldout", dirs_exist_ok=True)
        talks = (
            [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            for row in rows[:32]
        )
        lines = "\n".join(json.dumps({"messages": talk}) for talk in talks)
        (self.folder / "held_out.jsonl").write_text(lines, "utf-8")
        pack = PackConfig(max_length=self.row_tokens, chat_template="chatml")
        pack_dataset(self.conversations, self.model, pack, 42, self.folder / "packed")

    def train(self, name: str, section: Any, stops: bool = False) -> str:
        """SHA-256 of the adapter; `stops` ends the child after a checkpoint and starts over."""
        from sft_core.convert import convert_checkpoint
        from sft_core.train import TrainInputs, train_adapter
        from sft_core.train.metrics import read_metrics

        folder = self.folder / name
        inputs = TrainInputs(
            packed=self.folder / "packed", base_model=self.model, trust_remote_code=False, work=folder / "work"
        )
        lines: list[str] = []
        if stops:
            self._stopped(inputs, section, folder)
        started = time.perf_counter()
        outcome = train_adapter(inputs, section, 7, folder / "out", lines.append)
        seconds = round(time.perf_counter() - started, 1)
        assert stops == any(line.startswith("resuming ") for line in lines), lines
        convert_checkpoint(folder / "out" / "checkpoint", folder / "adapter", self.lora, str(self.model))
        digest = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        metrics = read_metrics(folder / "work" / "metrics.jsonl")
        self.bench.say(
            "product",
            run=name,
            seconds=seconds,
            notes=[line for line in lines if line.startswith("note")],
            tok_s=[round(entry["tokens_per_second"]) for entry in metrics],
            memory_gib=round(metrics[-1]["memory_bytes"] / 2**30, 2),
            loss=[round(entry["loss"], 4) for entry in metrics],
            facts=outcome.facts,
            adapter=digest[:12],
        )
        return digest

    def _stopped(self, inputs: Any, section: Any, folder: Path) -> None:
        from sft_core.train import train_adapter

        def stop(line: str) -> None:
            if line.startswith(f"step {STOP_AFTER}/"):
                raise StoppedError

        try:
            train_adapter(inputs, section, 7, folder / "begun", stop)
        except StoppedError:
            left = sorted(path.name for path in inputs.work.glob("checkpoint-*"))
            assert left, "no checkpoint to resume from"
            assert f"checkpoint-{MAX_STEPS}" not in left, "it was not stopped before the end"
        else:
            raise AssertionError("the run was not stopped")

    def steps(self) -> dict[str, Callable[[], Any]]:
        """What follows training."""
        from sft_core.chat import load_chat_model
        from sft_core.evaluate import EvaluatedModel, evaluate_model
        from sft_core.merge import MergeOptions, merge_adapter
        from sft_core.pack import load_chat_template
        from sft_core.recipe import EvaluateConfig

        merged = self.folder / "merged"
        options = MergeOptions(
            held_out=self.folder / "held_out.jsonl",
            chat_template=load_chat_template("chatml", None),
            max_divergence=9.0,
        )
        scored = EvaluatedModel(folder=merged, max_length=self.row_tokens)
        few = EvaluateConfig(max_generated_rows=4, max_new_tokens=16)
        asked = [{"role": "user", "content": "say w1"}]
        return {
            "merge": lambda: merge_adapter(self.model, self.folder / "first" / "adapter", merged, options).facts,
            "evaluate": lambda: evaluate_model(scored, self.conversations, few, 1, self.folder / "report").facts,
            "chat": lambda: "".join(load_chat_model(merged, None, None).answer(asked, 8, 0.0)),
        }


def _write_model(folder: Path, config: dict[str, Any], device: Any) -> None:
    """Weights in bf16, and a tokenizer of one token a byte."""
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
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**config, **tokens), dtype=torch.bfloat16)
    model.save_pretrained(folder)
