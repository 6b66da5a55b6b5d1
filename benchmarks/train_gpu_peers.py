"""The peers of `train_gpu.py`: TRL's SFTTrainer, and transformers' Trainer over PEFT, in this process.

In: a preset's rows, the same for all. Out: tokens a second, the first logged loss, the number of parameters, a note.
Both run as they come: gradient checkpointing, SDPA with a block mask from `position_ids`, logits of every token.
"""

import tempfile
import time
from typing import Any

from train_gpu_model import packed_documents, random_base


def run_peer(
    name: str, preset: Any, method: str, sizes: tuple[int, int, int], device: Any
) -> tuple[float, float, int, str]:
    """`sizes`: rows a step, warm-up steps, timed steps. ImportError where `name` is `trl` and TRL is not installed."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import TrainerCallback

    rows, warm_up, steps = sizes
    base, parameters = random_base(preset, method, device)
    if method == "qlora":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.enable_input_require_grads()
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
    return steps * rows * preset.row_tokens / seconds, loss, parameters, "gradient checkpointing, SDPA, all logits"


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
