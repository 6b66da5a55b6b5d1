"""Which of a folder's files belong to a split: the rule of `datasets`, from the names of files and folders.

In: paths below the folder, and a split. Out: the paths of that split, or a SourceError that names the files. A card
goes before (`card`). The rule (https://huggingface.co/docs/datasets/repository_structure; `datasets.data_files`):
`data/NAME-00000-of-00001.*` is of the split NAME; else a folder's, else a file's name tells by one of KEYWORDS between
its ends and the marks `-._ ` or digits; where no name tells, all files are `train`. Stricter than `datasets` where that
reads or drops rows in silence: letters' case does not count; a file whose names tell two splits, and one that tells
none beside files that do, are errors.
"""

import re
from collections.abc import Mapping, Sequence

from sft_core.errors import SourceError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARDED = re.compile(r"data/([^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
MARKS = r"[-._ 0-9]"
TOLD = {
    split: re.compile(rf"(?:^|{MARKS})(?:{'|'.join(words)})(?:$|{MARKS})", re.IGNORECASE)
    for split, words in KEYWORDS.items()
}
SHOWN = 3


Told = Mapping[str, tuple[str, ...]]
"""The splits that each path tells."""


def told_by_names(root: str, labels: Sequence[str], saved: Mapping[str, str]) -> Told:
    """The split of each path. `saved`: what saved data sets say they are, for when no name tells."""
    told = {label: splits_told(label) for label in labels}
    if not any(told.values()):
        return {label: (saved.get(label, "train"),) for label in labels}
    unclear = [label for label, splits in told.items() if len(splits) > 1]
    if unclear:
        raise SourceError(
            f"{root}: the name of {_shown(unclear)} tells {' and '.join(told[unclear[0]])}; rename it, or name the "
            "files that you mean by a pattern"
        )
    silent = [label for label, splits in told.items() if not splits]
    if silent:
        raise SourceError(
            f"{root}: some files' names tell their split, {_shown(silent)} not; name the files that you mean by a "
            f"pattern, or put a split into each name. {_by_split(told)}"
        )
    return told


def files_of_split(root: str, told: Told, split: str) -> list[str]:
    """The paths of `split`, in order."""
    chosen = [label for label, splits in told.items() if split in splits]
    if told and not chosen:
        raise SourceError(
            f"{root}: no file of the split {split!r}; set `split` to one that is there, or name the files that you "
            f"mean. {_by_split(told)}"
        )
    return chosen


def splits_told(label: str) -> tuple[str, ...]:
    """The splits that a path below the folder tells: one, none, or several that are at odds.

    >>> splits_told("data/test_sft-00000-of-00002.parquet"), splits_told("dev/a.csv"), splits_told("my-train.json")
    (('test_sft',), ('validation',), ('train',))
    >>> splits_told("rows.jsonl"), splits_told("contest.jsonl"), splits_told("train_eval.jsonl")
    ((), (), ('train', 'test'))
    """
    if sharded := SHARDED.fullmatch(label):
        return (sharded[1],)
    *folders, name = label.split("/")
    return _told(folders) or _told([name] if "." in name else [])


def _told(names: list[str]) -> tuple[str, ...]:
    return tuple(split for split, pattern in TOLD.items() if any(pattern.search(name) for name in names))


def _by_split(told: Told) -> str:
    found: dict[str, list[str]] = {}
    for label, splits in told.items():
        for split in splits:
            found.setdefault(split, []).append(label)
    return f"There are: {'; '.join(f'{split} ({_shown(labels)})' for split, labels in found.items())}"


def _shown(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more
