"""A tiny random model with a byte tokenizer, and conversations for it: the smallest things that are real."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core import stop
from tests.commands import commands

__all__ = ["commands"]  # a fixture: the process that runs commands one after another

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are taken in one order, whatever the number of cores
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is tested is the way on a processor
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")  # 20 s are too short on busy cores

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())]))
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("messages", MESSAGES),
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("row_number", pa.int64()),
    ]
)
SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(folder: Path) -> Path:
    """Random Llama of 2 layers, hidden 64, one token a byte, ChatML's control tokens; about 0.5 MB."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_as_found() -> Iterator[None]:
    """Which files a process of `-n 2` runs, and in what order, is chance: none may see what another left behind."""
    environment, folder = dict(os.environ), Path.cwd()
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)  # or it would win over MLFLOW_TRACKING_URI from here on
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


@pytest.fixture(autouse=True, scope="session")
def folders_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Code that tests write is trusted, wherever the test's current folder is."""
    base = tmp_path_factory.getbasetemp()  # of this process; those of `-n 2` share the folder above
    os.environ["SFT_TRUSTED_MODULES"] = str(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(autouse=True)
def signals_as_found() -> Iterator[None]:
    """A command that a test calls as a function goes on listening: the next test's SIGINT would be its own."""
    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    stop.leave()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model; do not write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make; copy it."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def write_conversations() -> Callable[[Path, int, int], Path]:
    """Write a Conversations folder of `train` and `heldout` one-turn rows, as normalize does."""

    def write(folder: Path, train: int, heldout: int) -> Path:
        for side, start, count in (("train", 0, train), ("heldout", 1000, heldout)):
            rows = [conversation(start + i) for i in range(count)]
            (folder / side).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / side / "part-00000.parquet")
        return folder

    return write


def conversation(number: int) -> dict[str, Any]:
    """Row `number`: asked to say a word, the assistant says it."""
    word = f"w{number * 7919 % 10007}"
    messages = [
        {"role": "user", "content": f"say {word}", "weight": None},
        {"role": "assistant", "content": f"{word}!", "weight": 1},
    ]
    return {"row_id": f"{number:032x}", "messages": messages, "dataset": "d", "file": "f", "row_number": number + 1}
