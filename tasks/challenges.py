"""How often a champion was challenged: the ledger of what the gate has spent of alpha.

In: a registered model's name, its champion. Out: a count. A challenge is a tag of the registered model, written under
the registry's lock before any alias moves: it outlives versions that are deleted, versions judged anew against another
champion, and runs that fail afterwards. What versions say (`sft.judged_against`) counts as well: older registries have
nothing else.
"""

from datetime import UTC, datetime

from tasks.registry import JUDGED_AGAINST, MERGED, NO_CHAMPION, RegisteredVersion, read_model_tags, read_versions
from tasks.tracking import client

CHALLENGE = "sft.challenge."
"""Tags of the registered model, `sft.challenge.<champion's number>.<start of a merged fingerprint>`: the time."""
FINGERPRINT_CHARACTERS = 32


def record_challenge(model_name: str, champion: RegisteredVersion | None, merged_fingerprint: str) -> None:
    """This model is being judged against this champion (None: against the base). Once a model, however often."""
    key = _prefix(champion) + merged_fingerprint[:FINGERPRINT_CHARACTERS]
    client().set_registered_model_tag(model_name, key, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


def count_challenges(model_name: str, champion: RegisteredVersion | None, merged_fingerprint: str) -> int:
    """How many other models were judged against this champion (or, before the first one, against the base)."""
    prefix, against = _prefix(champion), champion.number if champion is not None else NO_CHAMPION
    noted = {key.removeprefix(prefix) for key in read_model_tags(model_name) if key.startswith(prefix)}
    judged = [version.tags[MERGED] for version in read_versions(model_name) if _against(version) == against]
    noted |= {fingerprint[:FINGERPRINT_CHARACTERS] for fingerprint in judged}
    return len(noted - {merged_fingerprint[:FINGERPRINT_CHARACTERS]})


def _against(version: RegisteredVersion) -> str | None:
    return version.tags.get(JUDGED_AGAINST)


def _prefix(champion: RegisteredVersion | None) -> str:
    return f"{CHALLENGE}{champion.number if champion is not None else NO_CHAMPION}."
