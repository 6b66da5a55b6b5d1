"""transformers' Trainer on packed rows: arguments, order of data, and the log of the run."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from sft_core.errors import TrainError
from sft_core.pack import IGNORE_INDEX
from sft_core.pack.collate import collate
from sft_core.train.checkpoints import mark_complete, step_of
from sft_core.train.metrics import append_metrics, progress_line, rewind_metrics
from sft_core.train.spec import TrainSpec
from sft_core.train.stream import PackedStream
from sft_core.train.zero import deepspeed_config


class PackedTrainer(Trainer):
    """Trainer that keeps the stream's order. Loss is a mean over the supervised tokens of the whole optimizer step."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def training_arguments(spec: TrainSpec, max_steps: int) -> TrainingArguments:
    """The recipe's `train` section as TrainingArguments."""
    config = spec.config
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=spec.checkpoints,
        max_steps=max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(config.warmup_ratio * max_steps),
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        deepspeed=deepspeed_config(config),
        use_cpu=not cuda,
        seed=spec.seed,
        data_seed=spec.seed,
        save_strategy="steps",
        save_steps=min(config.save_steps, max_steps),
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=True,
    )


class RunLog(TrainerCallback):
    """Counts tokens, writes `metrics.jsonl`, prints progress, marks checkpoints, stops on SIGTERM or a broken loss."""

    def __init__(self, spec: TrainSpec, stream: PackedStream, max_steps: int, stop: Any) -> None:
        self._spec, self._stream, self._max_steps, self._stop = spec, stream, max_steps, stop
        self._metrics = Path(spec.metrics)
        self._pad_id = stream.pad_token_id
        self._tokens = self._supervised_tokens = 0
        self._clock = time.monotonic()
        self._tokens_at_clock = 0

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Packed rows to one batch; counts what this rank feeds the model."""
        batch = collate(rows, self._pad_id)
        self._tokens += sum(len(sequence.input_ids) for row in rows for sequence in row)
        self._supervised_tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        return batch

    def start(self, resumed_from: Path | None) -> None:
        """Say what begins, and forget log lines of steps that will be done again."""
        if resumed_from is not None:
            print(f"resuming from {resumed_from.name} of {self._max_steps} optimizer steps", flush=True)
        rewind_metrics(self._metrics, step_of(resumed_from) if resumed_from else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One metrics line and one progress line a logged step."""
        if logs is None or "loss" not in logs:
            return
        if not 0 < float(logs["loss"]) < float("inf"):
            raise TrainError(f"loss is {logs['loss']} at optimizer step {state.global_step}; nothing useful can follow")
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        entry = {
            "time": int(time.time() * 1000),
            "optimizer_step": state.global_step,
            "max_steps": self._max_steps,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "epoch": self._spec.config.num_train_epochs * state.global_step / self._max_steps,
            "tokens": self._tokens * args.world_size,
            "supervised_tokens": self._supervised_tokens * args.world_size,
            "tokens_per_second": (self._tokens - self._tokens_at_clock)
            * args.world_size
            / max(now - self._clock, 1e-9),
        }
        self._clock, self._tokens_at_clock = now, self._tokens
        append_metrics(self._metrics, entry)
        print(progress_line(entry), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save and stop when asked to; always save the last step."""
        if self._stop.agree(args.device):
            control.should_save = control.should_training_stop = True
        if state.global_step >= self._max_steps:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer calls this after everything is on disk."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
