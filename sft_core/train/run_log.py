"""What is seen and kept of a run: `metrics.jsonl`, progress lines, the marks of checkpoints."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sft_core.train.best import best_of
from sft_core.train.checkpoints import counts_of, keep_newest, mark_complete, step_of
from sft_core.train.isolation import check_isolation
from sft_core.train.loss import choose_loss, in_parts
from sft_core.train.machine import check_rotary
from sft_core.train.metrics import append_metrics, memory_bytes, progress_line, rewind_metrics
from sft_core.train.spec import SAMPLES, TrainSpec


class RunLog(TrainerCallback):
    """Rank 0 writes. `trainer` is set by the Trainer that is logged."""

    trainer: Any

    def __init__(self, spec: TrainSpec, max_steps: int, packs: bool) -> None:
        self._spec, self._max_steps, self._packs = spec, max_steps, packs
        self._metrics = Path(spec.metrics)
        self._clock = self._began = time.monotonic()
        self._tokens_at_clock = self._began_at = 0

    def start(self, resumed_from: Path | None, speaks: bool) -> None:
        """Go on counting where `resumed_from` ended, and forget log lines of steps that will be done again."""
        if resumed_from is not None:
            self.trainer.counts = counts_of(resumed_from)
        self._tokens_at_clock = self.trainer.counts.tokens
        if speaks:
            if resumed_from is not None:
                print(f"resuming from {resumed_from.name} of {self._max_steps} optimizer steps", flush=True)
            for path in (self._metrics, Path(self._spec.checkpoints) / SAMPLES):
                rewind_metrics(path, step_of(resumed_from) if resumed_from else 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Prove that packed documents do not see each other and that positions are exact, on the model as it will be
        trained; under ZeRO-3 only now a loss can be tried out."""
        check_rotary(model)
        if in_parts(model):
            self.trainer.loss_way, why = choose_loss(model, gathers=True)
            if state.is_world_process_zero:
                print(f"note: loss {self.trainer.loss_way} ({why})", flush=True)
        if self._packs:
            check_isolation(model, model.config.get_text_config().vocab_size)
        self._clock = self._began = time.monotonic()
        self._began_at = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One metrics line and one progress line a logged step."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        now, counts = time.monotonic(), self.trainer.counts
        seconds_a_step = (now - self._began) / max(state.global_step - self._began_at, 1)
        entry = {
            "time": int(time.time() * 1000),
            "optimizer_step": state.global_step,
            "max_steps": self._max_steps,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "epoch": self._spec.config.num_train_epochs * state.global_step / self._max_steps,
            "tokens": counts.tokens,
            "supervised_tokens": counts.supervised_tokens,
            "skipped_steps": counts.skipped_steps,
            "tokens_per_second": (counts.tokens - self._tokens_at_clock) / max(now - self._clock, 1e-9),
            "memory_bytes": memory_bytes(),
            "seconds_left": seconds_a_step * (self._max_steps - state.global_step),
        }
        if "eval_loss" in logs:
            entry["eval_loss"] = float(logs["eval_loss"])
        self._clock, self._tokens_at_clock = now, counts.tokens
        append_metrics(self._metrics, entry)
        print(progress_line(entry), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Always log and save the last step; the first is logged by `logging_first_step`."""
        if state.global_step >= self._max_steps:
            control.should_save = control.should_log = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer calls this after every rank's files are written; only now may an older checkpoint go."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            config = self._spec.config
            micro_batches = args.world_size // config.sequence_parallel_size * config.gradient_accumulation_steps
            checkpoint = folder / f"checkpoint-{state.global_step}"
            every = self._spec.checkpoint_every if config.gradient_checkpointing else 0
            chosen = (config.rows_at_once, every) if self._spec.split_was_chosen else (0, 0)
            mark_complete(checkpoint, args.world_size, self.trainer.counts, micro_batches, chosen)
            best = best_of(state.log_history) if self._spec.config.load_best_model_at_end else None
            keep_newest(folder, self._spec.config.save_total_limit, best.optimizer_step if best else None)
