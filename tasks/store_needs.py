"""What registered versions need of a store, told by the registry.

In: the registry. Out: fingerprints that occur in a version's tags (its steps', its merged model's, its source's, its
base model's path), each with the first version that names it. Barred and archived versions count: only a deleted one
gives its artifacts up.
"""

import re

from sft_core.credentials import without_credentials
from tasks.registry import model_names, read_versions
from tasks.tracking import client

FINGERPRINT = re.compile("(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def registered_fingerprints() -> dict[str, str]:
    """`NAME version N` by fingerprint."""
    needed: dict[str, str] = {}
    for name in model_names():
        for version in read_versions(name):
            for text in version.tags.values():
                for fingerprint in FINGERPRINT.findall(text):
                    needed.setdefault(fingerprint, f"{name} version {version.number}")
    return needed


def registry_uri() -> str:
    """Which registry was asked."""
    return without_credentials(str(client().tracking_uri))
