"""What steps hand to one another: a reference, never data (DESIGN 1 and 3).

`Artifact` names the bytes; `Manifest` describes them and, by being there, says that they are complete.
"""

import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Self

KIND_OF_STEP = {
    "fetch": "RawDataset",
    "normalize": "Conversations",
    "pack": "PackedDataset",
    "train": "Checkpoint",
    "convert": "Adapter",
    "merge": "MergedModel",
    "evaluate": "EvaluationReport",
}
"""Steps that write to the store, in order, and what each writes. `register` writes to the registry."""

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A reference to one folder of the store."""

    kind: str
    uri: str
    fingerprint: str

    def as_dict(self) -> dict[str, str]:
        """Plain dict, as tasks return it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, str]) -> Self:
        """Back from `as_dict`."""
        return cls(**value)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of an artifact: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step reports beside its files.

    `ledger` balances what moved: `{"rows": {"in": 10, "out": 9, "set_aside": {"empty_answer": 1}}}`.
    `facts` are small figures worth showing and logging, such as the fill of the packed rows.
    """

    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`, written last. `parts` is what the fingerprint was made of; `inputs` the artifacts read."""

    kind: str
    step: str
    name: str
    fingerprint: str
    parts: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, StoredFile]
    ledger: dict[str, Any]
    facts: dict[str, Any]
    versions: dict[str, str]
    device: str
    started: str
    took_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """Back from `as_dict`. ValueError for what no step wrote: another type, a file outside of the folder."""
        _check_fields(value)
        for unit, entry in value["ledger"].items():
            if not isinstance(entry, dict) or not {"in", "out", "set_aside"} <= entry.keys():
                raise ValueError(f"its ledger of {unit} lacks in, out or set_aside")
        datetime.fromisoformat(value["started"])
        files = {name: _stored_file(name, entry) for name, entry in value["files"].items()}
        return cls(**{**value, "files": files})


FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "step", "name", "fingerprint", "device", "started"), str),
    **dict.fromkeys(("parts", "inputs", "files", "ledger", "facts", "versions"), dict),
    "took_seconds": (int, float),
}
SHA256 = re.compile("[0-9a-f]{64}")


def is_inside(name: str) -> bool:
    """Whether a relative path, as a manifest lists one, names a file below the folder, in its one spelling.

    >>> is_inside("train/part-00000.parquet"), is_inside("../other"), is_inside("/etc/passwd"), is_inside("a/./b")
    (True, False, False, False)
    """
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\0" not in name and name != "."
    return plain and not path.is_absolute() and ".." not in path.parts


def _check_fields(value: Any) -> None:
    if not isinstance(value, dict) or value.keys() != FIELD_TYPES.keys():
        raise ValueError(f"its keys are not {', '.join(FIELD_TYPES)}")
    wrong = [key for key, kind in FIELD_TYPES.items() if not isinstance(value[key], kind)]
    if wrong:
        raise ValueError(f"its {wrong[0]} is a {type(value[wrong[0]]).__name__}")
    if not value["files"]:
        raise ValueError("it lists no file")
    if not all(isinstance(source, str) for source in value["inputs"].values()):
        raise ValueError("its inputs are not fingerprints")


def _stored_file(name: str, entry: Any) -> StoredFile:
    """An entry of `files`. ValueError for a path out of the folder, or no size and SHA-256."""
    if not is_inside(name) or name == MANIFEST:
        raise ValueError(f"it lists {name!r}, which is no file of its folder")
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        raise ValueError(f"it does not give size and sha256 of {name!r}")
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"size or sha256 of {name!r} is not one")
    return StoredFile(size, sha256)


def check_ledger(step: str, ledger: dict[str, dict[str, Any]]) -> None:
    """Our own invariant: for every unit, in = out + everything set aside."""
    for unit, entry in ledger.items():
        set_aside = sum(entry["set_aside"].values())
        assert entry["in"] == entry["out"] + set_aside, (
            f"{step}: ledger of {unit} does not balance: {entry['in']} in, {entry['out']} out, {set_aside} set aside"
        )
