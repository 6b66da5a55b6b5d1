"""Whether enough is held out for the gate ever to promote a model.

In: the recipe and what normalize and pack wrote. Out: nothing, or a DataError with the number that is needed. The
number is the gate's own: with fewer rows its test cannot pass at the first challenge of a champion, even if every row
is better, and later challenges ask for more.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from sft_core.errors import DataError
from sft_core.pack.packed import TOKENIZER
from sft_core.pack.tokenizer import TokenizerSource, load_tokenizer
from sft_core.recipe import Recipe, RegisterConfig
from sft_core.register.spending import level_of, rows_needed

LEAVE_THE_SIDE = {
    "also_in_training": "are in training too",
    "near_duplicate": "are near duplicates of training rows (normalize.near_duplicates)",
    "repeated": "are there already",
}
"""Reasons of normalize's ledger to take a row out of the held-out side."""


def heldout_needed(register: RegisterConfig) -> int:
    """Held-out rows with which a run may begin training."""
    return register.min_heldout_rows or rows_needed(level_of(1, register.alpha, register.challenges_a_year))


def why_needed(register: RegisterConfig) -> str:
    """For messages: how many held-out rows are needed, and who says so."""
    if register.min_heldout_rows is not None:
        return f"register.min_heldout_rows is {register.min_heldout_rows}"
    return f"with fewer than {heldout_needed(register)} the gate can never promote a model"


def check_heldout(recipe: Recipe, facts: Mapping[str, Any], ledger: Mapping[str, Any]) -> None:
    """`facts` and `ledger` of normalize. DataError if the held-out side is too small."""
    left = facts["heldout_rows"]
    if left < heldout_needed(recipe.register_):
        words = heldout_shortage(left, recipe.register_, ledger["rows"]["set_aside"])
        raise DataError(f"{words}; register.min_heldout_rows: 1 trains all the same")


def heldout_shortage(left: int, register: RegisterConfig, set_aside: Mapping[str, int]) -> str:
    """What is wrong with a held-out side of `left` rows, and what to do. `set_aside` by normalize's reasons."""
    gone = [f"{set_aside[reason]} {words}" for reason, words in LEAVE_THE_SIDE.items() if set_aside.get(reason)]
    aside = f" (set aside: {', '.join(gone)})" if gone else ""
    return (
        f"{left} held-out rows are too few{aside}: {why_needed(register)}. Raise eval_fraction, name eval_datasets, or "
        "add rows"
    )


def check_scorable(recipe: Recipe, conversations: Path, packed: Path, template: str) -> None:
    """Encode held-out conversations with the packed rows' tokenizer until there are enough that evaluate can score.
    DataError if there are not."""
    from sft_core.evaluate.examples import scorable_examples  # which reads conversations, and so recipes

    tokenizer = load_tokenizer(TokenizerSource(packed / TOKENIZER, recipe.base_model.trust_remote_code))
    needed, set_aside = heldout_needed(recipe.register_), Counter[str]()
    examples = scorable_examples(conversations, tokenizer, template, recipe.pack.max_length, set_aside)
    if recipe.evaluate.judges_answers:
        calls = recipe.evaluate.primary_metric == "tool_calls"
        examples = (example for example in examples if (example.calls if calls else example.answer_is_trained))
    left = sum(1 for _ in islice(examples, needed))
    if left < needed:
        counts = ", ".join(f"{count} {reason}" for reason, count in set_aside.most_common())
        aside = f" (set aside: {counts})" if counts else ""
        answers = ""
        if recipe.evaluate.judges_answers:
            kind = "tool call" if recipe.evaluate.primary_metric == "tool_calls" else "text answer"
            answers = (
                f" by a {kind} (evaluate.primary_metric: {recipe.evaluate.primary_metric}; loss takes any row, "
                "tool_calls those that end with a call, exact_match, rouge_l and score those that end with a text)"
            )
        raise DataError(
            f"only {left} held-out rows can be scored{answers}{aside}: {why_needed(recipe.register_)}. Raise "
            f"pack.max_length ({recipe.pack.max_length}) or eval_fraction, or name eval_datasets; "
            "register.min_heldout_rows: 1 trains all the same"
        )
