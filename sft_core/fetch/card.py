"""The splits that a data set's card names: the `configs` at the head of a README.md, as hub repositories have them.

In: a folder's file system, and its data files' paths below it. Out: the split of each file that the card lists, or None
where there is no card, or none that lists files (https://huggingface.co/docs/hub/datasets-manual-configuration). The
configuration is the one of the recipe's `name`, else the default, else the only one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from sft_core.errors import SourceError
from sft_core.yaml_text import read_yaml

CARD = "README.md"
MOST_BYTES = 1_000_000
HEAD = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", re.DOTALL)
TRAIN = "train"


def splits_of_card(fs: Any, folder: str, labels: Sequence[str], name: str | None) -> dict[str, tuple[str, ...]] | None:
    """The splits of the files that the card lists; SourceError for several configurations without a default."""
    listed = [entry for entry in _configs(fs, folder) if "data_files" in entry and "data_dir" not in entry]
    if not listed:
        return None
    found: dict[str, set[str]] = {}
    for split, pattern in _patterns(_chosen(listed, folder, name)["data_files"]):
        for path in fs.glob(f"{folder}/{pattern}"):
            found.setdefault(path[len(folder) + 1 :], set()).add(split)
    return {label: tuple(sorted(found[label])) for label in labels if label in found} or None


def _configs(fs: Any, folder: str) -> list[dict[str, Any]]:
    card = f"{folder}/{CARD}"
    if not fs.isfile(card):
        return []
    head = HEAD.match(fs.cat_file(card, 0, MOST_BYTES).decode("utf-8", "replace"))
    try:
        data = read_yaml(head[1]) if head else None
    except yaml.YAMLError:
        return []  # a README of another kind
    configs = data.get("configs") if isinstance(data, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _chosen(listed: list[dict[str, Any]], folder: str, name: str | None) -> dict[str, Any]:
    names = [str(entry.get("config_name", "default")) for entry in listed]
    if name is None and len(listed) == 1:
        return listed[0]
    for entry, called in zip(listed, names, strict=True):
        if called == name or (name is None and (entry.get("default") is True or called == "default")):
            return entry
    raise SourceError(
        f"{folder}/{CARD} lists the configurations {', '.join(names)}; set `name` to one of them"
        f"{f', not {name!r}' if name else ''}, or name the files that you mean by a pattern"
    )


def _patterns(files: object) -> Iterator[tuple[str, str]]:
    """(split, pattern) of what stands under `data_files`."""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (
            (str(entry.get("split", TRAIN)), entry.get("path")) if isinstance(entry, dict) else (TRAIN, entry)
        )
        yield from ((split, path) for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str))
