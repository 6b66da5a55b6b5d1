"""Greedy answers, generated in batches of similar length."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft_core.errors import DataError
from sft_core.memory_faults import by_halves, naming_memory_faults
from sft_core.pack.stops import stops_of

LOWER = "lower evaluate.max_new_tokens, or set evaluate.max_generated_rows to 0"

BATCH_SECONDS = 4 * 3600.0
"""For the answers of one batch; `evaluate.max_new_tokens` bounds them in tokens."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer. `ended`: whether a stop token came within the tokens allowed."""

    text: str
    ended: bool


def stop_ids_of(network: Any, tokenizer: Any, chat_template: str) -> list[int] | None:
    """Tokens at which a server ends an answer, calls of tools among them: the template's and the model's own."""
    own = network.generation_config.eos_token_id
    ends = tokenizer.convert_tokens_to_ids(list(stops_of(tokenizer, chat_template).strings))
    ids = [*ends, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in ids if token is not None}) or None


@torch.no_grad()
def generate_answers(
    model: tuple[Any, Any], prompts: Sequence[list[int]], options: dict[str, int], stop_ids: Sequence[int]
) -> list[Answer]:
    """One answer a prompt, in order, from (network, tokenizer); it ends at any of `stop_ids`.

    `options`: `max_new_tokens`, `batch_size`; a batch is halved where memory runs out. DataError if one takes over
    BATCH_SECONDS, MemoryFault if memory does not suffice for one prompt.
    """
    network, tokenizer = model
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    for start in range(0, len(order), options["batch_size"]):
        indices = order[start : start + options["batch_size"]]
        with naming_memory_faults(f"an answer to a prompt of {len(prompts[indices[-1]])} tokens", LOWER):
            new_ids = by_halves(
                lambda some: _generate_batch(network, list(some), options["max_new_tokens"], (pad_id, stop_ids)),
                [prompts[i] for i in indices],
            )
        for i, (ids, ended) in zip(indices, new_ids, strict=True):
            answers[i] = Answer(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ended)
    return [answers[i] for i in range(len(prompts))]


def _generate_batch(
    network: Any, prompts: list[list[int]], max_new_tokens: int, ids: tuple[int, Sequence[int]]
) -> list[tuple[list[int], bool]]:
    """New ids up to the stop token, and whether there was one."""
    pad_id, stop_ids = ids
    length = max(map(len, prompts))
    device = next(network.parameters()).device
    input_ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in prompts], device=device)
    attention_mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    began = time.monotonic()
    output = network.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        max_time=BATCH_SECONDS,
    )
    if time.monotonic() - began > BATCH_SECONDS:
        raise DataError(
            f"evaluate: {len(prompts)} answers of up to {max_new_tokens} tokens took over {BATCH_SECONDS:.0f} s; lower "
            "evaluate.max_new_tokens or evaluate.batch_size, or set evaluate.max_generated_rows to 0"
        )
    stops = set(stop_ids)
    rows = []
    for row in output[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        rows.append((row[:end], end is not None))
    return rows
