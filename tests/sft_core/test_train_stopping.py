"""SIGTERM in the middle of a long optimizer step: what was finished is saved, and the end is as if nothing had been."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.train import stopping
from sft_core.train.checkpoints import counts_of, newest_complete
from sft_core.train.metrics import read_metrics
from sft_core.train.ranks import SAVING, Heart
from sft_core.train.trainer import PackedTrainer
from sft_core.train.worker import EXIT_STOPPED
from tests.sft_core.train_runs import config, make_packed, status_here, train_here, weights_hash

SECTION = config(lora={"lora_dropout": 0.3}, save_steps=3)
"""5 optimizer steps of 4 micro-batches; dropout, so that random numbers out of place are seen."""


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_conversations: Callable[..., Path]
) -> Path:
    return make_packed(tmp_path_factory.mktemp("stopping"), tiny_model, write_conversations)


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(packed, tiny_model, tmp_path_factory.mktemp("undisturbed"), SECTION)


def stop_in(micro_batch: int, long_step_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM while micro-batch number `micro_batch` of the process is at work."""
    done, step = [0], PackedTrainer.training_step

    def counted(trainer: Any, *arguments: Any, **named: Any) -> Any:
        done[0] += 1
        if done[0] == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **named)

    monkeypatch.setattr(PackedTrainer, "training_step", counted)
    monkeypatch.setattr(stopping, "LONG_STEP_SECONDS", long_step_seconds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [(9, 2), (11, 2), (13, 3), (2, None)],
    ids=["first of a step", "within a step", "behind a checkpoint", "within the first step"],
)
def test_a_stop_within_a_step_loses_only_that_step(
    stop: tuple[int, int | None],
    undisturbed: Path,
    packed: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    micro_batch, saved = stop
    stop_in(micro_batch, 0.0, monkeypatch)
    assert status_here(packed, tiny_model, tmp_path, SECTION) == EXIT_STOPPED
    newest = newest_complete(tmp_path / "work")
    assert (newest and newest.name) == (f"checkpoint-{saved}" if saved else None)
    if newest is not None:
        finished = next(e for e in read_metrics(undisturbed / "metrics.jsonl") if e["optimizer_step"] == saved)
        assert counts_of(newest).tokens == finished["tokens"]
    monkeypatch.undo()
    out = train_here(packed, tiny_model, tmp_path, SECTION)
    assert weights_hash(out) == weights_hash(undisturbed)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, undisturbed))
    assert [(e["loss"], e["tokens"]) for e in ours] == [(e["loss"], e["tokens"]) for e in theirs]


@pytest.mark.slow
def test_a_short_step_is_finished_first(
    packed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in(10, 600.0, monkeypatch)
    assert status_here(packed, tiny_model, tmp_path, SECTION) == EXIT_STOPPED
    newest = newest_complete(tmp_path / "work")
    assert newest is not None
    assert newest.name == "checkpoint-3"


@pytest.mark.slow
def test_the_launcher_is_told_that_a_stop_within_a_step_saves(
    packed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would take a long saving for a rank that is stuck."""
    said, say = [], Heart.say

    def heard(heart: Heart, **what: Any) -> None:
        said.append(what.get("state"))
        say(heart, **what)

    monkeypatch.setattr(Heart, "say", heard)
    stop_in(10, 0.0, monkeypatch)
    assert status_here(packed, tiny_model, tmp_path, SECTION) == EXIT_STOPPED
    assert said.count(SAVING) == 1
