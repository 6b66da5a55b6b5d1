"""Evaluate: one model + held-out Conversations -> EvaluationReport: per-example scores of that one model.

In: a model folder, a Conversations folder, the chat template. Out: `scores.parquet`, `report.json`. Comparing is
register's business.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_core.artifacts import Outcome
from sft_core.devices import placement
from sft_core.errors import ModelError
from sft_core.evaluate.answers import behind_thought, rouge_l, scorer_source
from sft_core.evaluate.calls import CallScore, score_calls
from sft_core.evaluate.harness import harness_parts, run_harness
from sft_core.evaluate.report import EvaluationReport, Identity, Score, read_report, write_report
from sft_core.evaluate.scorer import open_scorer
from sft_core.fingerprint import hash_value
from sft_core.memory_faults import release_memory
from sft_core.recipe import EvaluateConfig

__all__ = [
    "STEP_VERSION",
    "EvaluatedModel",
    "EvaluationReport",
    "Identity",
    "Score",
    "evaluate_model",
    "harness_parts",
    "read_report",
    "scorer_source",
]

STEP_VERSION = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """The model to score. `chat_template` is Jinja text; None takes the one in the model's own tokenizer.

    Conversations of more than `max_length` tokens are set aside, as they were in training.
    """

    folder: Path
    max_length: int
    trust_remote_code: bool = False
    chat_template: str | None = None


def evaluate_model(model: EvaluatedModel, conversations: Path, config: EvaluateConfig, seed: int, out: Path) -> Outcome:
    """Score every held-out conversation, and generate an answer to `config.max_generated_rows` of them."""
    with nullcontext() if config.scorer is None else open_scorer(config.scorer) as scorer:  # a wrong name fails at once
        return _evaluate(model, conversations, config, seed, out, scorer)


def _evaluate(
    model: EvaluatedModel, conversations: Path, config: EvaluateConfig, seed: int, out: Path, scorer: Any
) -> Outcome:
    import transformers  # slow to import

    from sft_core.evaluate.examples import identity_of, read_examples

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder, trust_remote_code=model.trust_remote_code)
    template = model.chat_template or tokenizer.chat_template
    if template is None:
        raise ModelError(f"{model.folder}: its tokenizer has no chat template; set pack.chat_template in the recipe")
    identity = identity_of(tokenizer, template)
    examples, ledger = read_examples(conversations, tokenizer, template, model.max_length)
    network = _load(model)
    scores = _teacher_forced(network, examples, config.batch_size)
    scores = _with_answers((network, tokenizer, template), examples, scores, config, seed, scorer)
    del network
    release_memory()  # the harness loads the model itself
    harness = run_harness(model.folder, config, trust_remote_code=model.trust_remote_code)
    summary = write_report(EvaluationReport(tuple(scores), identity, harness), out)
    return Outcome(ledger={"rows": ledger}, facts=summary)


def _load(model: EvaluatedModel) -> Any:
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, dtype="auto", trust_remote_code=model.trust_remote_code, **placement()
    )
    return network.eval()


def _teacher_forced(network: Any, examples: list[Any], batch_size: int) -> list[Score]:
    from sft_core.evaluate.scoring import score_sequences

    flat = [sequence for example in examples for sequence in example.sequences]
    token_scores = iter(score_sequences(network, flat, batch_size))
    scores = []
    for example in examples:
        parts = [next(token_scores) for _ in example.sequences]
        scores.append(
            Score(
                row_id=example.row_id,
                dataset=example.dataset,
                tags=example.tags,
                encoding=example.encoding,
                tokens=sum(part.tokens for part in parts),
                correct_tokens=sum(part.correct for part in parts),
                loss_sum=sum(part.loss_sum for part in parts),
                num_bytes=example.num_bytes,
                prompt=example.prompt,
                reference=example.reference,
            )
        )
    return scores


def _with_answers(
    model: tuple[Any, Any, str],
    examples: list[Any],
    scores: list[Score],
    config: EvaluateConfig,
    seed: int,
    scorer: Any,
) -> list[Score]:
    """Generate where the last message is a trained answer, and where it calls tools, as many of each; which rows, is
    drawn by (seed, row_id)."""
    from sft_core.evaluate.examples import check_prompt
    from sft_core.evaluate.generation import generate_answers, stop_ids_of

    drawn: list[int] = []
    for wanted in (lambda example: example.answer_is_trained, lambda example: bool(example.calls)):
        able = [i for i, example in enumerate(examples) if wanted(example)]
        drawn += sorted(able, key=lambda i: hash_value([seed, examples[i].row_id]))[: config.max_generated_rows]
    if not drawn:
        return scores
    network, tokenizer, template = model
    for i in drawn:
        check_prompt(examples[i], tokenizer, template)
    stop_ids = sorted({examples[i].stop_id for i in drawn} | set(stop_ids_of(network, tokenizer, template) or ()))
    options = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    answers = generate_answers((network, tokenizer), [examples[i].prompt_ids for i in drawn], options, stop_ids)
    scored = list(scores)
    for i, answer in zip(drawn, answers, strict=True):
        row = scores[i]
        if calls := examples[i].calls:
            rendered = str(tokenizer.decode(examples[i].reference_ids, skip_special_tokens=True))
            score = score_calls(calls, answer.text, rendered)
            scored[i] = _with_calls(row, answer, score, examples[i].reference_tokens)
            continue
        reference, said = behind_thought(row.reference), behind_thought(answer.text)
        scored[i] = replace(
            row,
            answer=answer.text,
            ended=answer.ended,
            reference_tokens=examples[i].reference_tokens,
            exact_match=said == reference,
            rouge_l=rouge_l(reference, said),
            score=None if scorer is None else scorer(row.row_id, examples[i].messages, said),
        )
    return scored


def _with_calls(row: Score, answer: Any, calls: CallScore, reference_tokens: int) -> Score:
    return replace(
        row,
        answer=answer.text,
        ended=answer.ended,
        reference_tokens=reference_tokens,
        tool_names=calls.names,
        tool_arguments=calls.arguments,
        tool_calls=calls.equal,
    )
