"""A version that waits for a person: answered once, by whoever is first, and only while the verdict holds."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from sft_core.errors import RegistryError
from tasks import approval, models
from tasks.approval import claim, read_approval, request_approval
from tasks.registry import barred_because, read_history, read_verdict_table, read_version, read_versions
from tasks.registry_lock import registry_lock
from tests.tasks.models_project import aliases, built_project, empty_registry, register_again, registry

__all__ = ["built_project", "empty_registry", "registry"]
pytestmark = pytest.mark.slow
THREAD_SECONDS = 800


@pytest.fixture
def waiting(registry: MlflowClient) -> MlflowClient:
    """Version 2 passed the gate against champion 1, and waits."""
    registry.set_registered_model_alias("orders", "champion", "1")
    registry.delete_registered_model_alias("orders", "previous")
    with registry_lock("orders"):
        assert request_approval("orders", "2", 72) == []
    return registry


def state(number: str = "2") -> str:
    found = read_approval(read_version("orders", number))
    assert found is not None
    return found.outcome


def last_words() -> str:
    return read_history("orders")[-1][1]


def test_approval_promotes_and_keeps_who_and_why(waiting: MlflowClient) -> None:
    assert state().startswith("waiting until ")
    assert models.promote("orders", "2", "reads well", by="Ada") == models.Moved("orders", "1", "2")
    assert aliases(waiting) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert state() == "approved, by Ada: reads well"
    assert last_words() == "1 -> 2: approved by Ada: reads well"


def test_rejection_bars_it_for_good(waiting: MlflowClient) -> None:
    assert models.reject("orders", "2", "too short", by="Ada") == "2"
    assert aliases(waiting)["champion"] == "1"
    assert state() == "rejected, by Ada: too short"
    assert last_words() == "1 stays: version 2 was rejected by Ada: too short"
    assert barred_because("orders", read_version("orders", "2").merged_fingerprint) == "rejected by Ada: too short"
    with pytest.raises(RegistryError, match="stays barred: rejected by Ada: too short"):
        models.promote("orders", "2", "please", override_gate=True, by="Bob")


def test_two_approvals_at_once_promote_once(waiting: MlflowClient) -> None:
    results: list[object] = []

    def answer(who: str) -> None:
        try:
            results.append(models.promote("orders", "2", "reads well", by=who))
        except models.NotPromotable as error:
            results.append(error)

    before = len(read_history("orders"))
    threads = [threading.Thread(target=answer, args=(who,)) for who in ("Ada", "Bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(THREAD_SECONDS)
    assert sorted(type(result).__name__ for result in results) == ["Moved", "NotPromotable"]
    assert len(read_history("orders")) == before + 1
    assert aliases(waiting)["previous"] == "1"


def test_an_answer_that_comes_too_late_changes_nothing(waiting: MlflowClient) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    waiting.set_model_version_tag("orders", "2", approval.UNTIL, past)
    with pytest.raises(models.NotPromotable, match="its time is up"):
        models.promote("orders", "2", "reads well", by="Ada")
    assert claim("orders", "2", "run", lambda _: True)[1].state == "expired"
    assert state() == "expired, nobody answered in time"
    assert last_words() == "1 stays: nobody answered in time whether version 2 may take its place"
    assert claim("orders", "2", "run", lambda _: True)[1].state == "expired"  # and is noted once
    assert [words for _, words in read_history("orders")].count(last_words()) == 1
    assert aliases(waiting)["champion"] == "1"


def test_a_champion_that_moved_meanwhile_is_not_replaced(waiting: MlflowClient) -> None:
    waiting.set_model_version_tag("orders", "2", "sft.judged_against", "7")
    with pytest.raises(models.NotPromotable, match="judged against 7, the champion is 1") as refused:
        models.promote("orders", "2", "reads well", by="Ada")
    approval.refuse_request("orders", "2", str(refused.value))
    assert state().startswith("refused, orders version 2 was judged against 7")
    approval.refuse_request("orders", "2", "some other reason")
    assert "some other reason" not in state()


def test_a_newer_version_that_passes_supersedes_the_older(registry: MlflowClient) -> None:
    with registry_lock("orders"):
        request_approval("orders", "1", 72)
        registry.set_model_version_tag("orders", "1", approval.ASKED_BY, "run-1")
        assert [earlier.asked_by for earlier in request_approval("orders", "2", 72)] == ["run-1"]
        assert request_approval("orders", "2", 72) == []  # a retry
    assert state("1") == "superseded, version 2 passed the gate meanwhile"
    assert state("2").startswith("waiting")


def test_one_flow_run_asks_and_another_takes_over_when_it_ended(waiting: MlflowClient) -> None:
    assert claim("orders", "2", "run-a", lambda _: True)[1].asked_by == "run-a"
    assert claim("orders", "candidate", "run-b", lambda run: run == "run-a")[1].asked_by == "run-a"
    assert claim("orders", "2", "run-b", lambda _: False)[1].asked_by == "run-b"
    with pytest.raises(RegistryError, match="does not wait for approval: the gate said"):
        claim("orders", "1", "run-c", lambda _: True)


def test_a_promotion_that_was_interrupted_is_finished_by_the_retry(waiting: MlflowClient) -> None:
    waiting.set_model_version_tag("orders", "2", "sft.replaced", "1")
    waiting.set_registered_model_alias("orders", "champion", "2")  # and there the process died
    assert models.promote("orders", "2", "reads well", by="Ada") == models.Moved("orders", "1", "2")
    assert state() == "approved, by Ada: reads well"
    with pytest.raises(models.NotPromotable, match="is the champion already"):
        models.promote("orders", "2", "reads well", by="Ada")


def test_the_champion_is_rolled_back_not_rejected(registry: MlflowClient) -> None:
    with pytest.raises(models.NotPromotable, match="is the champion: roll it back instead"):
        models.reject("orders", "2", "too short")


def test_register_leaves_what_passes_as_candidate(built_project: Path, empty_registry: MlflowClient) -> None:
    asking = {"approval": "manual", "approval_timeout_hours": 5}
    register_again(built_project, "1", **asking)
    (version,) = read_versions("orders")
    assert aliases(empty_registry) == {"candidate": "1"}
    assert version.verdict.startswith("passed the gate: beats the base: loss ")
    found = read_approval(version)
    assert found is not None
    assert 4.5 * 3600 < found.seconds_left <= 5 * 3600
    assert "| base | loss |" in read_verdict_table(version)
    register_again(built_project, "2", **asking)
    assert state("1") == "superseded, version 2 passed the gate meanwhile"
    assert models.promote("orders", "2", "reads well").after == "2"  # by hand, as sft models promote does
    assert state("2").endswith(": reads well")
    assert aliases(empty_registry) == {"candidate": "2", "champion": "2"}
