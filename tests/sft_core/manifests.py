"""A manifest of a folder, as small as one can be."""

from pathlib import Path
from typing import Any

from sft_core.artifacts import Manifest
from sft_core.store import list_files


def manifest_of(folder: Path, fingerprint: str, **parts: Any) -> Manifest:
    """Of packed rows, made of `parts`; it lists the files of the folder."""
    return Manifest(
        kind="PackedDataset",
        step="pack",
        name="test:pack",
        fingerprint=fingerprint,
        parts=parts,
        inputs={},
        files=list_files(folder),
        ledger={},
        facts={},
        versions={},
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        took_seconds=0.0,
    )
