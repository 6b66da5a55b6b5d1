"""The one list of what each shipped map_fn reads of a row: which columns it needs, which it uses, what it adds.

In: a row. Out: the map_fns that fit it; the columns that one leaves unread. A column that is known to carry context and
is not used sets the row aside (`unread_column`): without it the answer is trained to another question than it was given
to. Other unread columns are counted, and `sft data check` lists them. What a map_fn of a user's own reads is not known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import short
from sft_core.normalize.map_fns import MAP_FNS
from sft_core.normalize.map_fns.prompts import ARXIV, CODER, COLORIST, LAWYER, MEDICAL, SQL
from sft_core.normalize.marks import CAMEL, check_row, is_mark

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
VERDICTS = ("label", "kto_tag")
"""Columns of TRL's and LLaMA-Factory's unpaired preferences: false says that the answer is a bad one."""
PREFERENCES = frozenset("rejected rejected_response rejected_responses rejected_answer chosen chosen_response".split())
MEDIA = frozenset("image images video videos audio audios".split())
CONTEXT = frozenset(
    "system system_prompt system_message history chat_history conversation_history tools functions context contexts "
    "document documents chat_template_kwargs".split()
)
THOUGHTS = frozenset(
    "reasoning reasoning_content thinking thought thoughts think cot chain_of_thought reasoning_details".split()
)
"""Columns that hold what was thought before a plain answer in a column of its own."""
SOURCES = frozenset("passage article paragraph choices options".split())
"""Columns that a question of a column of its own is about."""
EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "none", "nan"})
WHY = {
    "preference": "preference data is no data for supervised fine-tuning: keep the good answers only",
    "media": "no step reads images, sounds or videos, and texts that speak of them mislead",
    "thought": "the answer would be trained without its thought; messages keep it, as reasoning_content",
    "context": "the answer would be trained without what it was given to",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """`ways`: the columns that the map_fn cannot do without, in the order in which it looks; `uses`: columns that it
    reads where they are; `asks`: columns that belong to the request where they are, and that it does not read; `adds`:
    the system prompt that it puts into every row; `flat`: one answer, a text in a column; `holds`: a text that the
    first of its columns must hold before it is suggested."""

    ways: tuple[tuple[str, ...], ...]
    uses: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    adds: str = ""
    flat: bool = False
    holds: str = ""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the columns."""
        if not any(row.keys() >= set(way) for way in self.ways):
            return False
        return not self.holds or self.holds in str(row[self.ways[0][0]]).casefold()

    def of(self, row: Mapping[str, Any]) -> frozenset[str]:
        """The columns that are read of this row."""
        way = next((way for way in self.ways if row.keys() >= set(way)), sum(self.ways, ()))
        return frozenset((*way, *self.uses))


def _flat(*ways: str, **keys: Any) -> Reads:
    return Reads(ways=tuple(tuple(way.split()) for way in ways), flat=True, **keys)


READS: dict[str, Reads] = {
    "messages": Reads(ways=(("messages",),), uses=(*SYSTEM, *TOOLS)),
    "openai": Reads(ways=(("messages",),), uses=SYSTEM),
    "sharegpt": Reads(ways=(("conversations",),), uses=(*SYSTEM, *TOOLS)),
    "wizardlm": Reads(ways=(("conversations",),)),
    "msagent_react": Reads(ways=(("conversations",),)),
    "alpaca_zh": _flat("instruction_zh output_zh", uses=("input_zh",)),
    "dolly": _flat("instruction context response"),
    "openorca": _flat("system_prompt question response"),
    "sql": _flat("context question answer", adds=SQL, holds="create table"),
    "squad": _flat("context question answers", "context question answer"),
    "arxiv": _flat("abstract title", adds=ARXIV),
    "colors": _flat("description color", adds=COLORIST),
    "prompt_completion": _flat("prompt completion", "prompt response", uses=(*SYSTEM, *TOOLS)),
    "code_alpaca": _flat("prompt completion", adds=CODER),
    "tiny_codes": _flat("prompt response", adds=CODER),
    "stack_exchange": _flat("question response"),
    "gsm8k": _flat("question answer"),
    "law_reference": _flat("question answer", adds=LAWYER),
    "alpaca": _flat("instruction output", uses=("input", "history", *SYSTEM)),
    "medical": _flat("instruction output", uses=("input",), adds=MEDICAL),
    "default": _flat("input output", "conversation", asks=("instruction",)),
    "crime_kg_assitant": _flat("input output", asks=("instruction",), adds=LAWYER),
    "oasst1": Reads(ways=(("text",),)),
    "pretrain": Reads(ways=(("text",),)),
}
"""Best fit first: ours before XTuner's where they read the same column and keep more of it, many columns before few,
those that add no system prompt before those that do."""
OF_FUNCTION: dict[Callable[..., Any], tuple[str, Reads]] = {
    MAP_FNS[name]: (name, entry) for name, entry in READS.items()
}


def suggest_map_fns(row: object) -> tuple[str, ...]:
    """Names of the shipped map_fns that can read a row's columns, the best fit first.

    >>> suggest_map_fns({"prompt": "Print 1.", "response": "print(1)"})
    ('prompt_completion', 'tiny_codes')
    >>> suggest_map_fns({"query": "1 + 1", "reply": "2"})
    ()
    """
    if not isinstance(row, dict):
        return ()
    return tuple(name for name, entry in READS.items() if entry.fits(row))


def added_system(name: str) -> str:
    """The system prompt that a shipped map_fn puts into every row; empty where it adds none, or is none of ours."""
    return READS[name].adds if name in READS else ""


def unread_columns(row: Mapping[str, Any], map_fn: Callable[..., Any]) -> list[str]:
    """Columns that hold something and that a shipped map_fn does not read. The row's marks are read for all of them.

    >>> unread_columns({"instruction": "I", "output": "O", "id": 7, "lang": "", "weight": 1}, MAP_FNS["alpaca"])
    ['id']
    """
    found = OF_FUNCTION.get(map_fn)
    if found is None:
        return []
    read = found[1].of(row)
    return [name for name, value in row.items() if name not in read and not is_mark(name) and holds_something(value)]


def check_columns(row: Mapping[str, Any], map_fn: Callable[..., Any]) -> None:
    """RowError where a shipped map_fn leaves context unread, or where the row as a whole is marked as not trained."""
    found = OF_FUNCTION.get(map_fn)
    if found is None:
        return
    name, entry = found
    bad = [column for column in VERDICTS if row.get(column) is False and column not in entry.of(row)]
    for column in (*bad, *unread_columns(row, map_fn)):
        kind = "preference" if column in bad else "context" if column in entry.asks else _kind(column, entry.flat)
        if kind:
            raise RowError(
                "unread_column",
                f"column {column!r} is not read by {name}: {short(row[column])}; {WHY[kind]}. A map_fn of your own can "
                "use the column or leave it out",
            )
    check_row({key: value for key, value in row.items() if key not in entry.of(row)})


def holds_something(value: object) -> bool:
    """Whether a column holds more than blanks, false, or lists and mappings of such.

    >>> [holds_something(value) for value in (None, " ", [], "[]", [None, ""], False, 0, "x")]
    [False, False, False, False, False, False, True, True]
    """
    if isinstance(value, str):
        return value.strip().casefold() not in EMPTY_TEXTS
    if isinstance(value, dict):
        return any(holds_something(entry) for entry in value.values())
    if isinstance(value, list):
        return any(holds_something(entry) for entry in value)
    return value is not None and value is not False


@lru_cache(maxsize=4096)
def _kind(column: object, flat: bool) -> str | None:
    """What a column is known to carry."""
    name = CAMEL.sub("_", str(column)).lower().replace("-", "_").replace(" ", "_")
    if name in PREFERENCES:
        return "preference"
    if name in MEDIA:
        return "media"
    if flat and name in THOUGHTS:
        return "thought"
    return "context" if name in CONTEXT or (flat and name in SOURCES) else None
