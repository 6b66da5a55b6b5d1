"""Held-out loss and sample answers while training; the best weights; the stop when it gets no better.

In: the recipe's `eval_steps` and what depends on it. Out: `eval_loss` in the log entry of that optimizer step, lines of
`samples.jsonl` (`optimizer_step`, `prompt`, `answer`), a checkpoint of each new best. The trajectory of training stays
what it is without.
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft_core.errors import TrainError
from sft_core.pack import PackedDataset, stop_token_ids
from sft_core.pack.tokenizer import TokenizerSource, load_tokenizer
from sft_core.recipe import TrainConfig
from sft_core.train.best import best_of
from sft_core.train.heldout import HeldOut, in_eval_mode, read_held_out
from sft_core.train.metrics import append_metrics
from sft_core.train.spec import SAMPLES, TrainSpec

SHOWN_CHARACTERS = 100
"""Of a sample's prompt and answer, in its line for people."""


class HeldOutEvaluation(TrainerCallback):
    """At every `eval_steps`, and at the last optimizer step."""

    def __init__(self, trainer: Any, held_out: HeldOut, config: TrainConfig, max_steps: int) -> None:
        self._trainer, self._held_out, self._config, self._max_steps = trainer, held_out, config, max_steps
        self.samples: Samples | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Evaluate when it is due; log it, keep the best, stop when patience is at its end."""
        config, step = self._config, state.global_step
        assert config.eval_steps is not None, "without it there is no such callback"
        if step % config.eval_steps and step < self._max_steps:
            return control
        trainer = self._trainer

        def beat() -> None:
            trainer.callback_handler.on_prediction_step(args, state, control)

        loss = self._held_out.loss(trainer.model_wrapped, trainer.loss_way, args.device, beat)
        if not math.isfinite(loss):
            raise TrainError(f"optimizer step {step}: the held-out loss is {loss}; lower train.learning_rate")
        trainer.eval_loss = loss
        control.should_log = True
        best = best_of([*state.log_history, {"step": step, "eval_loss": loss}])
        assert best is not None, "there is one now"
        if config.load_best_model_at_end and best.since == 0:
            control.should_save = True
        if config.early_stopping_patience is not None and best.since >= config.early_stopping_patience:
            control.should_training_stop = control.should_save = True
            if state.is_world_process_zero:
                since = f"no better than step {best.optimizer_step} in {best.since} evaluations"
                print(f"note: step {step}: {since}, so training ends", flush=True)
        if self.samples is not None and state.is_world_process_zero:
            self.samples.write(trainer, step)
        return control


class Samples:
    """Answers to the recipe's prompts, greedy."""

    def __init__(self, config: TrainConfig, tokenizer: Any, path: Path) -> None:
        self._tokenizer, self._path, self._prompts = tokenizer, path, config.sample_prompts
        self._max_new_tokens = config.sample_max_new_tokens
        self._stop_ids = stop_token_ids(tokenizer, tokenizer.chat_template)

    def write(self, trainer: Any, optimizer_step: int) -> None:
        """Add a line a prompt, and say them."""
        for prompt, answer in zip(self._prompts, self._answers(trainer), strict=True):
            append_metrics(self._path, {"optimizer_step": optimizer_step, "prompt": prompt, "answer": answer})
            asked, answered = (repr(text[:SHOWN_CHARACTERS]) for text in (prompt, answer))
            print(f"note: step {optimizer_step}: {asked} -> {answered}", flush=True)

    def _answers(self, trainer: Any) -> list[str]:
        from sft_core.evaluate.generation import generate_answers

        ids = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in self._prompts
        ]
        options = {"max_new_tokens": self._max_new_tokens, "batch_size": 1}
        with in_eval_mode(trainer.model), trainer.accelerator.autocast():
            answers = generate_answers((trainer.model, self._tokenizer), ids, options, self._stop_ids)
        return [answer.text for answer in answers]


def open_evaluation(spec: TrainSpec, trainer: Any, packed: PackedDataset, max_steps: int) -> HeldOutEvaluation:
    """The callback for this run. TrainError where there are no held-out conversations."""
    config = spec.config
    if spec.conversations is None:
        raise TrainError("train.eval_steps is set, but there are no conversations to evaluate on; set it to null")
    tokenizer = load_tokenizer(TokenizerSource(packed.tokenizer, spec.trust_remote_code))
    held_out = read_held_out(Path(spec.conversations), packed, tokenizer, config.rows_at_once)
    evaluation = HeldOutEvaluation(trainer, held_out, config, max_steps)
    if config.sample_prompts:
        evaluation.samples = Samples(config, tokenizer, Path(spec.checkpoints) / SAMPLES)
    return evaluation
