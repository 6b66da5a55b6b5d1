"""Evaluate: one model + held-out Conversations -> EvaluationReport: per-example scores of that one model.

In: a model folder, a Conversations folder, the chat template. Out: `scores.parquet`, `report.json`. Comparing is
register's business.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_core.artifacts import Outcome
from sft_core.errors import DataError, ModelError, RowError
from sft_core.evaluate.report import EvaluationReport, Score, read_report, write_report
from sft_core.fingerprint import hash_value
from sft_core.recipe import EvaluateConfig

__all__ = ["STEP_VERSION", "EvaluatedModel", "EvaluationReport", "Score", "evaluate_model", "read_report"]

STEP_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """The model to score. `chat_template` is Jinja text; None takes the one in the model's own tokenizer.

    Conversations of more than `max_length` tokens are set aside, as they were in training.
    """

    folder: Path
    max_length: int
    trust_remote_code: bool = False
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class _Example:
    """One held-out conversation, encoded for scoring and, with its last answer cut off, for generation."""

    row_id: str
    dataset: str
    sequences: list[Any]
    messages: list[dict[str, Any]]


def evaluate_model(model: EvaluatedModel, conversations: Path, config: EvaluateConfig, seed: int, out: Path) -> Outcome:
    """Score every held-out conversation, and generate an answer to `config.max_generated_rows` of them."""
    import transformers  # slow to import

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder, trust_remote_code=model.trust_remote_code)
    template = model.chat_template or tokenizer.chat_template
    if template is None:
        raise ModelError(f"{model.folder}: its tokenizer has no chat template; set pack.chat_template in the recipe")
    examples, ledger = _encode(conversations, tokenizer, template, model.max_length)
    network = _load(model)
    scores = _teacher_forced(network, tokenizer, examples, config.batch_size)
    scores = _with_answers((network, tokenizer), examples, scores, config, seed)
    summary = write_report(EvaluationReport(tuple(scores)), out)
    return Outcome(ledger={"rows": ledger}, facts=summary)


def _load(model: EvaluatedModel) -> Any:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, dtype="auto", trust_remote_code=model.trust_remote_code
    )
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _encode(
    conversations: Path, tokenizer: Any, template: str, max_length: int
) -> tuple[list[_Example], dict[str, Any]]:
    from sft_core.pack import IGNORE_INDEX, encode_conversation, tools_of

    examples: list[_Example] = []
    set_aside: Counter[str] = Counter()
    for row in _held_out_rows(conversations):
        try:
            sequences = encode_conversation(row["messages"], tokenizer, template, tools_of(row))
        except RowError as error:
            set_aside[error.reason] += 1
            continue
        if max((len(sequence.input_ids) for sequence in sequences), default=0) > max_length:
            set_aside["overlong"] += 1
        elif all(label == IGNORE_INDEX for sequence in sequences for label in sequence.labels):
            set_aside["nothing_trained"] += 1
        else:
            examples.append(_Example(row["row_id"], row["dataset"], sequences, row["messages"]))
    rows_in = len(examples) + set_aside.total()
    if not examples:
        raise DataError(
            f"{conversations}: of {rows_in} held-out conversations none can be scored ({dict(set_aside)}); "
            f"raise pack.max_length ({max_length}) or eval_fraction"
        )
    return examples, {"in": rows_in, "out": len(examples), "set_aside": dict(set_aside)}


def _held_out_rows(conversations: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for path in sorted((conversations / "heldout").glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def _teacher_forced(network: Any, tokenizer: Any, examples: list[_Example], batch_size: int) -> list[Score]:
    from sft_core.evaluate.scoring import score_sequences
    from sft_core.pack import IGNORE_INDEX

    flat = [sequence for example in examples for sequence in example.sequences]
    token_scores = iter(score_sequences(network, flat, batch_size))
    scores = []
    for example in examples:
        parts = [next(token_scores) for _ in example.sequences]
        trained = [label for s in example.sequences for label in s.labels if label != IGNORE_INDEX]
        text = tokenizer.decode(trained, skip_special_tokens=True)
        prompt, reference = _prompt_and_reference(example.messages)
        scores.append(
            Score(
                row_id=example.row_id,
                dataset=example.dataset,
                tokens=sum(part.tokens for part in parts),
                correct_tokens=sum(part.correct for part in parts),
                loss_sum=sum(part.loss_sum for part in parts),
                num_bytes=len(text.encode()),
                prompt=prompt,
                reference=reference,
            )
        )
    return scores


def _prompt_and_reference(messages: list[dict[str, Any]]) -> tuple[str, str]:
    asked = [m["content"] for m in messages if m["role"] == "user"]
    return " / ".join(asked), messages[-1]["content"]


def _with_answers(
    model: tuple[Any, Any], examples: list[_Example], scores: list[Score], config: EvaluateConfig, seed: int
) -> list[Score]:
    """Generate where the last message is a trained answer; which rows, is drawn by (seed, row_id)."""
    from sft_core.evaluate.generation import generate_answers
    from sft_core.pack import IGNORE_INDEX

    able = [i for i, e in enumerate(examples) if e.messages[-1]["role"] == "assistant" and len(e.messages) > 1]
    drawn = sorted(able, key=lambda i: hash_value([seed, examples[i].row_id]))[: config.max_generated_rows]
    if not drawn:
        return scores
    stop_ids = {next(x for x in reversed(examples[i].sequences[-1].labels) if x != IGNORE_INDEX) for i in drawn}
    prompts = [_prompt_ids(examples[i].sequences[-1]) for i in drawn]
    options = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    answers = generate_answers(model, prompts, options, sorted(stop_ids))
    scored = list(scores)
    for i, answer in zip(drawn, answers, strict=True):
        match = answer == scores[i].reference.strip()
        scored[i] = replace(scores[i], answer=answer, exact_match=match)
    return scored


def _prompt_ids(sequence: Any) -> list[int]:
    """Everything before the last trained turn: the ids of training, so what people typed stays text here too."""
    from sft_core.pack import IGNORE_INDEX

    start = max(i for i, label in enumerate(sequence.labels) if label != IGNORE_INDEX)
    while start > 0 and sequence.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return list(sequence.input_ids[:start])
