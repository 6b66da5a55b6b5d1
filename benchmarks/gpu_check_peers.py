"""The peers of `gpu_check.py`: transformers' Trainer over PEFT, and TRL's SFTTrainer, in this process.

In: a bench. Out: a line of the table each, on the same rows: NF4 base, LoRA r=16 on all linear layers, no dropout. Both
run as they come: gradient checkpointing, SDPA with a block mask from `position_ids`, logits of every token, autocast.
"""

import importlib.util
import tempfile
import time
from typing import Any

from gpu_check_bench import Bench
from gpu_check_model import packed_documents, random_base

WARM_UP, STEPS = 2, 4
NAMES = {"trl": "TRL", "peft": "transformers + PEFT"}


def peers(bench: Bench) -> dict[str, Any]:
    """Those that are installed; a fault of one is its line."""
    for name, title in NAMES.items():
        if importlib.util.find_spec(name) is None:
            bench.say("peers", peer=title, left_out="not installed")
            continue
        try:
            speed, loss = run_peer(bench, name)
        except Exception as error:  # noqa: BLE001 - out of memory, or the peer's own
            bench.speed("peers", title, fault=f"{type(error).__name__}: {str(error)[:160]}")
            continue
        bench.speed("peers", title, rows=1, tok_s=round(speed), peak_gib=bench.peak_gib(), loss=loss)
    return {}


def run_peer(bench: Bench, name: str) -> tuple[float, float]:
    """Tokens a second, and the first logged loss."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import TrainerCallback

    rows, warm_up, steps, preset, device = 1, WARM_UP, STEPS, bench.preset, bench.device
    base, _ = random_base(preset, "qlora", device)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.enable_input_require_grads()
    bench.forget_peak()
    marks: list[float] = []

    class Clock(TrainerCallback):
        """Marks the end of every step, when the device is done with it."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())

    made = [packed_documents(preset, rows, seed) for seed in range(warm_up + steps)]
    flat = [row for batch in made for row in batch]
    with tempfile.TemporaryDirectory(prefix="sft-peer-") as folder:
        shared = {
            "output_dir": folder,
            "max_steps": warm_up + steps,
            "per_device_train_batch_size": rows,
            "learning_rate": 2e-4,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "bf16": device.type == "cuda",
            "use_cpu": device.type == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        trainer = _trl(model, shared, flat, preset) if name == "trl" else _transformers(model, shared, flat)
        trainer.add_callback(Clock())
        trainer.train()
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    seconds = marks[-1] - marks[warm_up - 1]
    return steps * rows * preset.row_tokens / seconds, loss


def _transformers(model: Any, shared: dict[str, Any], rows: list[list[Any]]) -> Any:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from sft_core.pack.collate import collate

    class InOrder(Trainer):
        """The rows in the order of the other measurements."""

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(**shared, remove_unused_columns=False)
    return InOrder(model, arguments, data_collator=lambda some: collate(some, 0), train_dataset=rows)


def _trl(model: Any, shared: dict[str, Any], rows: list[list[Any]], preset: Any) -> Any:
    """One packed row a data row, with the lengths of its documents, as TRL's `bfd` packing leaves them."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
    columns = {
        "input_ids": [[token for one in row for token in one.input_ids] for row in rows],
        "labels": [[label for one in row for label in one.labels] for row in rows],
        "seq_lengths": [[len(one.input_ids) for one in row] for row in rows],
    }
    skip = {"skip_prepare_dataset": True}
    arguments = trl.SFTConfig(**shared, padding_free=True, max_length=None, dataset_kwargs=skip)
    return trl.SFTTrainer(model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
