"""Shards on threads: results in order, the first error, and the tokenizer's own threads off but at the end."""

import gc
import os
import threading
import time
from collections.abc import Sequence

import pytest

from sft_core.errors import DataError
from sft_core.pack import overlap
from sft_core.pack.overlap import PARALLELISM, map_overlapped
from sft_core.shards import Made


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap.os, "sched_getaffinity", lambda _: {0, 1})


def names(made: Sequence[Made]) -> list[int]:
    return [entry.facts["number"] for entry in made]


def test_results_come_in_order_from_as_many_threads_as_cores() -> None:
    both = threading.Barrier(2, timeout=120)

    def work(number: int) -> Made:
        if number < 4:
            both.wait()  # passes only where two shards are worked on at a time
        return Made({}, {"number": number})

    assert names(list(map_overlapped(work, range(7)))) == list(range(7))


@pytest.mark.parametrize("before", [None, "false", "true"])
def test_the_tokenizers_own_threads_help_at_the_end_only(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv(PARALLELISM, raising=False)
    if before:
        monkeypatch.setenv(PARALLELISM, before)
    seen = {}

    def work(number: int) -> Made:
        seen[number] = os.environ[PARALLELISM]
        if number == 5:  # goes on until it is alone
            deadline = time.monotonic() + 120
            while seen[number] != "true" and time.monotonic() < deadline:
                time.sleep(0.01)
                seen[number] = os.environ[PARALLELISM]
        return Made({}, {"number": number})

    assert names(list(map_overlapped(work, range(6)))) == list(range(6))
    assert seen == {**dict.fromkeys(range(5), "false"), 5: "true"}
    assert os.environ.get(PARALLELISM) == before
    assert gc.get_freeze_count() == 0


def test_the_first_error_is_raised_and_the_rest_dropped() -> None:
    begun = []

    def work(number: int) -> Made:
        begun.append(number)
        if number in (1, 2):
            raise DataError(f"shard {number}")
        return Made({}, {"number": number})

    with pytest.raises(DataError, match="shard 1"):
        list(map_overlapped(work, range(100)))
    assert len(begun) < 10
