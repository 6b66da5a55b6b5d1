"""When normalize fails: too many rows set aside, a data set of no use, an empty side.

In: the tally and the recipe's limit. Out: nothing, or a DataError that says what, where and what to do.
"""

from collections.abc import Mapping

from sft_core.errors import DataError
from sft_core.normalize.load import shipped_name
from sft_core.normalize.tally import DETAIL_CHARACTERS, NO_FAULT, Tally

REASONS_SHOWN = 3


def check_limits(
    tally: Tally, max_quarantined_fraction: float, map_fns: Mapping[str, str], *, held_out: bool = True
) -> None:
    """`map_fns`: the map_fn of each data set, for advice; `held_out`: whether some of these rows must be held out."""
    if not tally.rows:
        raise DataError(f"no row to normalize in {', '.join(map_fns) or 'no data set at all'}; check what fetch wrote")
    fraction = tally.faulty / tally.rows
    if fraction > max_quarantined_fraction:
        raise DataError(
            f"{tally.faulty} of {tally.rows} rows ({fraction:.1%}) cannot be used; normalize.max_quarantined_fraction "
            f"allows {max_quarantined_fraction:.1%}.\n{_reasons(tally)}\n{_advice(tally, map_fns)}"
        )
    for name, entry in tally.datasets.items():
        if entry.faulty == entry.came.rows and max_quarantined_fraction < 1:
            raise DataError(
                f"not one of the {entry.came.rows} rows of data set {name!r} can be used.\n{_reasons(tally)}\n"
                f"{_advice(tally, map_fns)}, or leave the data set out"
            )
    if not tally.on("train"):
        raise DataError(f"no training rows are left of {tally.rows}.\n{_reasons(tally)}\n{_advice(tally, map_fns)}")
    if held_out and not tally.on("heldout"):
        raise DataError(_nothing_held_out(tally))


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


def _reasons(tally: Tally) -> str:
    """The commonest reasons with a row each."""
    lines = []
    for reason, count in tally.reasons.most_common(REASONS_SHOWN):
        example = tally.examples[reason]
        place = f"{example.file} row {example.row_number}"
        lines.append(f"  {count} {reason}, such as {place}: {example.detail[:DETAIL_CHARACTERS]}")
    return "\n".join(lines)


def _advice(tally: Tally, map_fns: Mapping[str, str]) -> str:
    """What to do about the commonest fault."""
    faults = [reason for reason, _ in tally.reasons.most_common() if reason not in NO_FAULT]
    if not faults and tally.reasons["left_out"]:
        return "The map_fn returns None, which leaves a row out; let it return a conversation, or add rows"
    if not faults:
        return "Raise weight, or add rows"
    example = tally.examples[faults[0]]
    now = map_fns[example.dataset]
    fitting = [name for name in example.fitting if name != shipped_name(now)]
    other = f"the columns of that row fit {' or '.join(fitting)}" if fitting else "your own: path.py:function"
    return (
        f"Fix these rows, choose another map_fn for {example.dataset} (now {now}; {other}), "
        "or raise normalize.max_quarantined_fraction"
    )
