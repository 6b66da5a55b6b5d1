"""Scores of one generated answer: exact match, ROUGE-L, the user's scorer.

In: prompt messages, reference, answer; texts without their thoughts. Out: numbers. ROUGE-L (Lin 2004) is Google's
rouge-score; its own tokenizer drops all that is not ASCII, so texts are cut here: words where they stand apart, else
(Chinese, Thai) characters.
"""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from sft_core.blank import is_blank
from sft_core.errors import DataError, RecipeError, SftError
from sft_core.normalize import load_map_fn, map_fn_source
from sft_core.pack.thoughts import without_thought

Scorer = Callable[[list[dict[str, Any]], str, str], float]
KEY = "evaluate.scorer"
WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Chinese characters: scripts that do not part words."""
TOKEN = re.compile(rf"[{WITHOUT_SPACES}]|[^\W{WITHOUT_SPACES}]+")


class RougeTokens:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words and single characters; punctuation is left out.

        >>> RougeTokens().tokenize("Yes, 24 of \u5317\u4eac!")
        ['yes', '24', 'of', '\u5317', '\u4eac']
        """
        return TOKEN.findall(text.lower())


def behind_thought(text: str) -> str:
    """What an answer says once it has thought; nothing, if it was cut in the middle of its thought.

    >>> behind_thought("<think>One and one.</think>\\n\\nTwo.")
    'Two.'
    >>> behind_thought("<think>One and"), behind_thought("\\u200b")
    ('', '')
    """
    parts = without_thought(text)
    cut = parts is None and text.lstrip().startswith("<think>")
    said = (text if parts is None else parts[1]).strip()
    return "" if cut or is_blank(said) else said


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence, 0 to 1; two texts without any word are equal or not."""
    if not TOKEN.search(reference) and not TOKEN.search(answer):
        return float(reference.strip() == answer.strip())
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # slow to import

    return RougeScorer(["rougeL"], tokenizer=RougeTokens())


def load_scorer(name: str) -> Scorer:
    """The user's function: `package.module:function` or `path.py:function`, found as a map_fn is."""
    return _as_scorer(name, load_map_fn)


def scorer_source(name: str | None) -> dict[str, Any] | None:
    """Who a scorer is, for the fingerprint; nothing is run."""
    return None if name is None else _as_scorer(name, map_fn_source)


def _as_scorer(name: str, find: Callable[[str], Any]) -> Any:
    if ":" not in name:
        raise RecipeError(f"{KEY} {name!r}: write package.module:function or path.py:function")
    try:
        return find(name)
    except RecipeError as error:
        raise RecipeError(str(error).replace("map_fn", KEY, 1)) from error.__cause__


def score_answer(scorer: Scorer, row_id: str, messages: list[dict[str, Any]], answer: str) -> float:
    """The user's score of an answer to all messages but the last. DataError if it is no finite number."""
    try:
        value: Any = scorer(messages[:-1], behind_thought(messages[-1]["content"] or ""), answer)
        number = float(value)
    except SftError:
        raise
    except BaseException as error:  # a user's scorer may raise anything, in the process that runs nothing else
        words = " ".join(str(error).split())
        raise DataError(f"{KEY}: row {row_id}: {type(error).__name__}: {words}; it must return a number") from error
    if not math.isfinite(number):
        raise DataError(f"{KEY}: row {row_id}: it returned {value!r}; it must return a finite number")
    return number
