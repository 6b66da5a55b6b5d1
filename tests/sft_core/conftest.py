"""The packed rows that tests of train share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_conversations: Callable[..., Path]
) -> Path:
    """40 short conversations in rows of 128 tokens; what they come from lies beside it. Do not write to it."""
    from tests.sft_core.train_runs import make_packed

    return make_packed(tmp_path_factory.mktemp("data"), tiny_model, write_conversations)
