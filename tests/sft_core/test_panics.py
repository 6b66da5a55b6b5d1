"""Panics of the tokenizer's library, real ones: an error of one line."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.chat import load_chat_model
from sft_core.errors import ModelError
from sft_core.evaluate import EvaluatedModel, evaluate_model
from sft_core.pack import load_chat_template, pack_dataset
from sft_core.panics import panics_told
from sft_core.recipe import EvaluateConfig, PackConfig

DAMAGED = base64.b64encode(b"\x04\x00\x00\x00aaaaaaa").decode()
"""A table of SentencePiece whose places point outside of it."""


@pytest.fixture
def panicking(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer panics at the first text."""
    folder = shutil.copytree(tiny_model, tmp_path / "panicking")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": DAMAGED}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return folder


def test_pack(panicking: Path, tmp_path: Path, write_conversations: Callable[..., Path]) -> None:
    conversations = write_conversations(tmp_path / "conversations", 40, 4)
    config = PackConfig(max_length=128, chat_template="chatml")
    message = "the tokenizer's library failed on its files .index out of bounds"
    with pytest.raises(ModelError, match=message) as raised, panics_told("pack"):
        pack_dataset(conversations, panicking, config, 42, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_evaluate(panicking: Path, tmp_path: Path, write_conversations: Callable[..., Path]) -> None:
    conversations = write_conversations(tmp_path / "conversations", 0, 4)
    model = EvaluatedModel(folder=panicking, max_length=128, chat_template=load_chat_template("chatml"))
    with (
        pytest.raises(ModelError, match="evaluate/base, with panicking: the tokenizer"),
        panics_told("evaluate/base, with panicking"),
    ):
        evaluate_model(model, conversations, EvaluateConfig(), 1, tmp_path / "out")


def test_chat(panicking: Path) -> None:
    model = load_chat_model(panicking, None, "chatml")
    with pytest.raises(ModelError, match="the tokenizer's library failed"), panics_told("a model's files"):
        list(model.answer([{"role": "user", "content": "hello"}], 4, 0.0))


def test_other_exceptions_pass() -> None:
    with pytest.raises(KeyboardInterrupt), panics_told("x"):
        raise KeyboardInterrupt
