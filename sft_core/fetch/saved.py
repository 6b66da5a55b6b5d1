"""Folders: plain ones, and those that `datasets` writes with `save_to_disk` (Dataset, DatasetDict).

In: a folder on any file system, and a split. Out: the files of the split (`card`, `splits`), in order. A saved data set
is the Arrow files that its `state.json` lists, in that order; `cache-*.arrow` that `map` left beside them,
fingerprints and the JSON files that describe it are no data. A DatasetDict has a folder a split, named by
`dataset_dict.json`. A folder that is one saved data set is read whatever split it says it is, if `split` is `train`,
the default: it was named itself.
"""

import json
from pathlib import PurePosixPath
from typing import Any

from sft_core.errors import SourceError
from sft_core.fetch.card import TRAIN, splits_of_card
from sft_core.fetch.compression import plain_suffix
from sft_core.fetch.formats import SUFFIXES
from sft_core.fetch.splits import files_of_split, told_by_names

DICT, STATE = "dataset_dict.json", "state.json"
DESCRIPTIONS = frozenset({DICT, STATE, "dataset_info.json", "dataset_infos.json"})


def folder_files(fs: Any, root: str, split: str, name: str | None = None) -> list[tuple[str, str]]:
    """(path, label) of the data files of a split below a folder."""
    folder = _folder_of_split(fs, root.rstrip("/"), split)
    is_dict = folder != root.rstrip("/")
    listed = sorted(fs.find(folder, detail=True).items())
    files = [path for path, info in listed if info["type"] != "other"]  # a pipe or a socket would never end
    found = [path for path in files if not _is_hidden(path[len(folder) + 1 :])]
    saved = {parent(path): _listed(fs, path) for path in found if _is_state(path, found)}
    paths: list[str] = []
    for path in found:
        if parent(path) not in saved:
            paths += [path] if _is_data(path) else []
        elif PurePosixPath(path).name == STATE:
            paths += saved[parent(path)]
    labels = {path[len(folder) + 1 :]: path for path in paths}
    if is_dict or (set(saved) == {folder} and split in (TRAIN, _said(fs, folder))):
        return [(path, label) for label, path in labels.items()]
    said = {label: _said(fs, parent(path)) for label, path in labels.items() if parent(path) in saved}
    told = splits_of_card(fs, folder, list(labels), name) or told_by_names(root, list(labels), said)
    return [(labels[label], label) for label in files_of_split(root, told, split)]


def _said(fs: Any, folder: str) -> str:
    """The split that a saved data set says it is."""
    split = _read(fs, f"{folder}/{STATE}").get("_split")
    return split if isinstance(split, str) and split else TRAIN


def parent(path: str) -> str:
    """The folder that a path lies in."""
    return path.rpartition("/")[0]


def _is_hidden(label: str) -> bool:
    return any(part[0] in "._" for part in label.split("/"))


def _is_data(path: str) -> bool:
    return plain_suffix(path) in SUFFIXES and PurePosixPath(path).name not in DESCRIPTIONS


def _is_state(path: str, found: list[str]) -> bool:
    """`state.json` of a saved data set: with `dataset_info.json` or Arrow files beside it."""
    if PurePosixPath(path).name != STATE:
        return False
    beside = [other for other in found if parent(other) == parent(path) and other != path]
    return any(other.endswith((".arrow", "/dataset_info.json")) for other in beside)


def _folder_of_split(fs: Any, root: str, split: str) -> str:
    if not fs.exists(f"{root}/{DICT}"):
        return root
    splits = _read(fs, f"{root}/{DICT}").get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise SourceError(f"{root}/{DICT}: it lists no `splits`; write the data set again with save_to_disk")
    if split not in splits:
        raise SourceError(f"{root}: a saved DatasetDict without the split {split!r}; it has: {', '.join(splits)}")
    return f"{root}/{split}"


def _listed(fs: Any, state_path: str) -> list[str]:
    """The Arrow files that `state.json` lists, all there."""
    state = _read(fs, state_path)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise SourceError(
            f"{state_path}: saved by an old `datasets` as a selection of rows; load it with load_from_disk and "
            "save_to_disk it again"
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        paths = [f"{parent(state_path)}/{PurePosixPath(name).name}" for name in names]
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{state_path}: not what save_to_disk writes: {type(error).__name__}: {error}; save the data set again"
        ) from error
    missing = [path for path in paths if not fs.isfile(path)]
    if missing:
        raise SourceError(f"{state_path} lists {missing[0]}, which is not there; copy the whole folder again")
    return paths


def _read(fs: Any, path: str) -> dict[str, Any]:
    try:
        value = json.loads(fs.cat_file(path))
    except ValueError as error:
        raise SourceError(f"{path}: not JSON: {error}; save the data set again with save_to_disk") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: not a JSON object; save the data set again with save_to_disk")
    return value
