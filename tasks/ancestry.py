"""Which registered versions a base model leads back to: what they were trained on, its descendants know too.

In: a base model's path and fingerprint, as a version's tags or a plan name them. Out: versions, the nearest first.
"""

from collections.abc import Iterator
from pathlib import PurePath

from tasks.registry import AS_BASE, MERGED, RegisteredVersion, find_tagged

BASE_MODEL, BASE_FINGERPRINT = "sft.base_model", "sft.base_model_fingerprint"
FINGERPRINT_DIGITS = 64


def ancestors(base_model: str, base_fingerprint: str) -> Iterator[tuple[str, RegisteredVersion]]:
    """Names and versions, of any registered model. A base is a version if it is the store's merged artifact
    (`<store>/merge/<fingerprint>`), or if its files are those of a version, wherever they were copied to."""
    seen: set[tuple[str, str]] = set()
    while (found := _version_of(base_model, base_fingerprint)) is not None:
        name, version = found
        if (name, version.number) in seen:
            return
        seen.add((name, version.number))
        yield name, version
        base_model, base_fingerprint = version.tags.get(BASE_MODEL, ""), version.tags.get(BASE_FINGERPRINT, "")


def ancestors_of(version: RegisteredVersion) -> Iterator[tuple[str, RegisteredVersion]]:
    """Those of a version."""
    return ancestors(version.tags.get(BASE_MODEL, ""), version.tags.get(BASE_FINGERPRINT, ""))


def _version_of(base_model: str, base_fingerprint: str) -> tuple[str, RegisteredVersion] | None:
    folder = PurePath(base_model).name
    found = find_tagged(MERGED, folder) if len(folder) == FINGERPRINT_DIGITS else None
    if found is None and base_fingerprint:
        found = find_tagged(AS_BASE, base_fingerprint)
    return found
