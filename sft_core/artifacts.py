"""What steps hand to one another: a reference, never data (DESIGN 1 and 3).

`Artifact` names the bytes; `Manifest` describes them and, by being there, says that they are complete.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from sft_core.typed import read_typed

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
        """Back from `as_dict`. ValueError naming what is missing or of another type."""
        return read_typed(cls, json.dumps(value))


def check_ledger(step: str, ledger: dict[str, dict[str, Any]]) -> None:
    """Our own invariant: for every unit, in = out + everything set aside."""
    for unit, entry in ledger.items():
        set_aside = sum(entry["set_aside"].values())
        assert entry["in"] == entry["out"] + set_aside, (
            f"{step}: ledger of {unit} does not balance: {entry['in']} in, {entry['out']} out, {set_aside} set aside"
        )
