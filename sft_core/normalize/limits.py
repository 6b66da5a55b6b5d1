"""When normalize fails: an empty side, a data set of no use, more lost than the recipe allows.

In: the tally, or what the manifest says of it, and the recipe's limit. Out: nothing, or a DataError that says what,
where and what to do.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sft_core.account import NO_FAULT, check_account, loss_of
from sft_core.errors import DataError
from sft_core.normalize.load import shipped_name
from sft_core.normalize.tally import DETAIL_CHARACTERS, Tally

REASONS_SHOWN = 3


def check_sides(tally: Tally, map_fns: Mapping[str, str], *, held_out: bool = True) -> None:
    """DataError if a side is empty. `map_fns`: the map_fn of each data set, for advice; `held_out`: whether some of
    these rows must be held out."""
    if not tally.rows:
        raise DataError(f"no row to normalize in {', '.join(map_fns) or 'no data set at all'}; check what fetch wrote")
    if not tally.on("train"):
        reasons, examples = tally.reasons, tally.facts()["examples"]
        raise DataError(
            f"no training rows are left of {tally.rows}.\n{_reasons(reasons, examples)}\n"
            f"{_advice(reasons, examples, map_fns)}"
        )
    if held_out and not tally.on("heldout"):
        raise DataError(_nothing_held_out(tally))


def check_lost(
    facts: Mapping[str, Any], ledger: Mapping[str, Any], map_fns: Mapping[str, str], max_quarantined_fraction: float
) -> None:
    """DataError if more rows cannot be used than the recipe allows, or all of a data set. `facts`, `ledger`: of
    normalize."""
    reasons, examples = Counter(ledger["rows"]["set_aside"]), facts["examples"]
    why, advice = _reasons(reasons, examples), _advice(reasons, examples, map_fns)
    check_account(max_quarantined_fraction, (loss_of("normalize", ledger),), f".\n{why}", advice)
    for name, entry in facts["datasets"].items():
        faulty = sum(count for reason, count in entry["set_aside"].items() if reason not in NO_FAULT)
        if faulty == entry["rows"] and max_quarantined_fraction < 1:
            raise DataError(
                f"not one of the {entry['rows']} rows of data set {name!r} can be used.\n{why}\n{advice}, or leave the "
                "data set out"
            )


def _nothing_held_out(tally: Tally) -> str:
    exact, near = tally.reasons["also_in_training"], tally.reasons["near_duplicate"]
    if not exact + near:
        return (
            f"nothing is held out: none of {tally.on('train')} conversations fell to the held-out side; raise "
            "eval_fraction, name eval_datasets, or add rows"
        )
    parts = [f"{exact} rows of eval_datasets are in training too"] if exact else []
    parts += [f"{near} rows are near duplicates of training rows"] if near else []
    key = "; or raise normalize.near_duplicates (null keeps all but exact copies)" if near else ""
    return (
        f"nothing is held out: all {exact + near} held-out rows are set aside, as {' and '.join(parts)}. Name "
        f"eval_datasets of other rows, or raise eval_fraction{key}"
    )


def _reasons(reasons: Counter[str], examples: Mapping[str, Mapping[str, Any]]) -> str:
    """The commonest reasons with a row each."""
    lines = []
    for reason, count in reasons.most_common(REASONS_SHOWN):
        example = examples[reason]
        place = f"{example['file']} row {example['row_number']}"
        lines.append(f"  {count} {reason}, such as {place}: {example['detail'][:DETAIL_CHARACTERS]}")
    return "\n".join(lines)


def _advice(reasons: Counter[str], examples: Mapping[str, Mapping[str, Any]], map_fns: Mapping[str, str]) -> str:
    """What to do about the commonest fault."""
    faults = [reason for reason, _ in reasons.most_common() if reason not in NO_FAULT]
    if not faults and reasons["left_out"]:
        return "The map_fn returns None, which leaves a row out; let it return a conversation, or add rows"
    if not faults:
        return "Raise weight, or add rows"
    example = examples[faults[0]]
    now = map_fns[example["dataset"]]
    fitting = [name for name in example.get("fitting", ()) if name != shipped_name(now)]
    other = f"the columns of that row fit {' or '.join(fitting)}" if fitting else "your own: path.py:function"
    return f"Fix these rows, choose another map_fn for {example['dataset']} (now {now}; {other})"
