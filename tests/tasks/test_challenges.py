"""What the gate has spent of alpha is known whatever happens to versions afterwards."""

import pytest
from mlflow.tracking import MlflowClient

from tasks.challenges import count_challenges, record_challenge
from tasks.registry import RegisteredVersion, find_champion
from tests.tasks.models_project import empty_registry

__all__ = ["empty_registry"]
pytestmark = pytest.mark.slow
FINGERPRINTS = [letter * 64 for letter in "abcd"]


def add_version(client: MlflowClient, fingerprint: str, against: str) -> None:
    tags = {"sft.merged_fingerprint": fingerprint, "sft.judged_against": against}
    client.create_model_version("orders", "file:///nowhere", tags=tags)


def test_a_challenge_counts_once_and_outlives_its_version(empty_registry: MlflowClient) -> None:
    first, second, third, other = FINGERPRINTS
    assert count_challenges("orders", None, first) == 0  # no such model yet
    empty_registry.create_registered_model("orders")
    add_version(empty_registry, first, "none")
    record_challenge("orders", None, first)
    empty_registry.set_registered_model_alias("orders", "champion", "1")
    champion = find_champion("orders")
    assert count_challenges("orders", champion, second) == 0  # each champion has its own
    for fingerprint in (second, third):
        add_version(empty_registry, fingerprint, "1")
        record_challenge("orders", champion, fingerprint)
    record_challenge("orders", champion, third)  # tried again
    assert count_challenges("orders", champion, other) == 2
    assert count_challenges("orders", champion, third) == 1  # a model is no challenge of itself
    empty_registry.delete_model_version("orders", "2")
    empty_registry.set_model_version_tag("orders", "3", "sft.judged_against", "2")  # judged anew against another one
    assert count_challenges("orders", champion, other) == 2
    assert count_challenges("orders", None, other) == 1


def test_versions_of_an_older_registry_count_by_their_tags(empty_registry: MlflowClient) -> None:
    empty_registry.create_registered_model("orders")
    add_version(empty_registry, FINGERPRINTS[0], "7")
    add_version(empty_registry, FINGERPRINTS[1], "8")
    champion = RegisteredVersion("7", "e" * 64, ("champion",), {})
    assert count_challenges("orders", champion, FINGERPRINTS[2]) == 1
