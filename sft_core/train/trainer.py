"""transformers' Trainer on packed rows: order of data, one loss for every model, whole checkpoints.

In: the stream, a model, what watches the run. Out: checkpoints. Learning rate, schedule but for its warm-up, and
parameter groups (no decay of biases and norms) are the Trainer's.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from sft_core.errors import TrainError
from sft_core.memory_faults import memory_fault
from sft_core.pack import IGNORE_INDEX
from sft_core.train.attention import borders_at, goes_by_borders
from sft_core.train.batches import DOCUMENT_ENDS, ROW_NUMBERS, ROW_TOKENS, SUPERVISED, NumberedCollator, NumberedRows
from sft_core.train.checkpoints import Counts
from sft_core.train.initial import INITIAL
from sft_core.train.loss import LossWay, supervised_loss
from sft_core.train.ranks import waited_in_vain
from sft_core.train.sequence_parallel import AcrossRanks, SharedBatches
from sft_core.train.stream import PackedStream
from sft_core.train.watch import StepWatch


class PackedTrainer(Trainer):
    """Trainer that keeps the stream's order. Loss is a mean over the supervised tokens of the whole optimizer step."""

    loss_is_scaled_for_ga = True
    """By the supervised tokens of the whole optimizer step."""
    across: AcrossRanks | None = None
    """The ranks with which this one shares rows."""

    def __init__(
        self, model: Any, args: TrainingArguments, stream: PackedStream, watch: StepWatch, log: Any, loss_way: LossWay
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=NumberedRows(stream),
            data_collator=NumberedCollator(stream.pad_token_id),
            callbacks=[log],
        )
        self.counts = Counts()
        self.loss_way = loss_way
        self.eval_loss: float | None = None  # of the optimizer step at hand, for its log entry
        self._watch, self._pad_token_id = watch, stream.pad_token_id
        self._by_borders = goes_by_borders(model)
        log.trainer = self

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, but for the warm-up of n steps: from 1/(n+1) on, as a rate of 0 trains nothing."""
        made = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and isinstance(made, LambdaLR):
            beyond = list(made.lr_lambdas)
            self.lr_scheduler = LambdaLR(made.optimizer, [partial(_rising, warmup, later) for later in beyond])
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        if self.across is None:
            return SequentialSampler(rows)
        return SharedBatches(len(rows), self.args.per_device_train_batch_size, self.across.size)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Supervised tokens of the optimizer step at hand, all ranks together; at least 1, as it divides."""
        supervised = sum(batch[SUPERVISED] for batch in batch_samples)
        tokens = sum(sum(batch[ROW_TOKENS]) for batch in batch_samples)
        if self.args.world_size > 1:
            both = torch.tensor([supervised, tokens], device=device)
            dist.all_reduce(both)
            supervised, tokens = both.tolist()
        if self.across is not None:  # all ranks of a group counted the same rows
            supervised, tokens = supervised // self.across.size, tokens // self.across.size
        counts = self.counts
        self.counts = replace(
            counts, supervised_tokens=counts.supervised_tokens + supervised, tokens=counts.tokens + tokens
        )
        return torch.tensor(max(1, supervised), device=device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; the watch keeps its loss."""
        rows = inputs.pop(ROW_NUMBERS)
        inputs.pop(ROW_TOKENS)
        ends, supervised = inputs.pop(DOCUMENT_ENDS), inputs.pop(SUPERVISED)
        if self.across is not None:
            inputs = self.across.part(inputs, self._pad_token_id)
            supervised = (inputs["shift_labels"] != IGNORE_INDEX).sum()
        elif self._by_borders:
            inputs |= borders_at(ends, inputs["input_ids"].shape[1])
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._watch.add(loss, supervised, rows)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Times the number of ranks, as their gradients are averaged."""
        assert not return_outputs, "there are no logits to give"
        return supervised_loss(model, inputs, num_items_in_batch, self.loss_way) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the held-out loss where there is one."""
        if self.eval_loss is not None and "loss" in logs:
            logs["eval_loss"], self.eval_loss = self.eval_loss, None
        super().log(logs, start_time)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Called once an optimizer step, before it is taken (under DeepSpeed: just after)."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = float("nan") if norm is None else float(norm)
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            norm = float("inf")
        self._watch.check(self.state.global_step + 1, norm, may_overflow=self.args.fp16)
        if norm == float("inf") or norm != norm:
            self.counts = replace(self.counts, skipped_steps=self.counts.skipped_steps + 1)
            return 0.0  # nothing was moved
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, with one clear error where the disk is full; what was half written is deleted. A lost rank and
        a lack of memory are no matter of the disk: their errors go on as they are."""
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero() and (output / INITIAL).exists():
                shutil.copyfile(output / INITIAL, folder / INITIAL)
        except (OSError, RuntimeError, SafetensorError) as error:
            if waited_in_vain(error) or memory_fault(error) is not None:
                raise
            why = str(error.__cause__ or error).partition("\n")[0]
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free
            raise TrainError(
                f"{folder} could not be written ({why}); {free / 1e9:.1f} GB are free there. Earlier checkpoints are "
                "as they were: make room, and the same command goes on from the newest"
            ) from error


def _rising(warmup: int, later: Callable[[int], float], step: int) -> float:
    """Share of the peak rate at `step`, counted from 0."""
    return (step + 1) / (warmup + 1) if step < warmup else later(step)
