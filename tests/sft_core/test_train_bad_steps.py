"""A step that went bad ends the run, names its rows, and touches no checkpoint."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sft_core.errors import TrainError
from sft_core.pack import load_packed
from sft_core.train.checkpoints import newest_complete
from sft_core.train.stream import PackedStream
from sft_core.train.watch import MOST_OVERFLOWS, StepWatch
from tests.sft_core.train_runs import config, make_packed, train


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_conversations: Callable[..., Path]
) -> Path:
    """Conversation 17 holds the only `~`."""

    def write(folder: Path, count: int, heldout: int) -> Path:
        write_conversations(folder, count, heldout)
        shard = folder / "train" / "part-00000.parquet"
        table = pq.read_table(shard)
        rows = table.to_pylist()
        rows[17]["messages"][0]["content"] = "say ~"
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
        return folder

    return make_packed(tmp_path_factory.mktemp("data"), tiny_model, write)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with NaN for `~`: fine until that token comes."""
    folder = tmp_path_factory.mktemp("models") / "poisoned"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).encode("~")[0]] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"deepspeed": "zero2", "num_processes": 2, "dtype": "bfloat16"}])
def test_a_nan_loss_names_its_rows_and_saves_nothing(
    changes: dict[str, object], packed: Path, poisoned: Path, tmp_path: Path
) -> None:
    section = config(max_steps=None, num_train_epochs=1, gradient_accumulation_steps=1, save_steps=1, **changes)
    with pytest.raises(TrainError, match=r"optimizer step \d+: loss is nan; nothing useful") as fault:
        train(packed, poisoned, tmp_path, section)
    message = str(fault.value)
    bad = int(message.removeprefix("optimizer step ").partition(":")[0])
    assert f"d, f, row 18 ({17:032x})" in message
    rows = load_packed(packed).bins(0)
    batch = next(row for row in rows if 17 in row)
    assert message.count("d, f, row ") == len(batch)  # that packed row's conversations and no others
    newest = newest_complete(tmp_path / "work")
    assert newest is None if bad == 1 else newest == tmp_path / "work" / f"checkpoint-{bad - 1}"


@pytest.fixture
def watch(packed: Path) -> StepWatch:
    """Over one epoch of single rows."""
    dataset = load_packed(packed)
    return StepWatch(dataset, PackedStream(dataset, 1, 1), None)


def test_a_loss_of_exactly_zero_is_bad_where_something_is_supervised(watch: StepWatch) -> None:
    watch.add(torch.tensor(1.5), torch.tensor(3), [0])
    watch.add(torch.tensor(0.0), torch.tensor(0), [1])  # all padding
    watch.check(1, 1.0, may_overflow=False)
    watch.add(torch.tensor(0.0), torch.tensor(1), [2])
    with pytest.raises(TrainError, match=r"optimizer step 2: loss is 0\.0"):
        watch.check(2, 1.0, may_overflow=False)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_broken_gradient_names_all_rows_of_the_step(watch: StepWatch, packed: Path, norm: float) -> None:
    for row in (0, 1):
        watch.add(torch.tensor(1.5), torch.tensor(3), [row])
    with pytest.raises(TrainError, match=f"the losses are finite, but the gradient's norm is {norm}") as fault:
        watch.check(9, norm, may_overflow=False)
    dataset = load_packed(packed)
    for number in [number for row in dataset.bins(0)[:2] for number in row][:16]:
        assert dataset.row_id(number) in str(fault.value)


def test_float16_may_overflow_while_it_looks_for_its_scale_but_not_for_ever(watch: StepWatch) -> None:
    def step(norm: float) -> None:
        watch.add(torch.tensor(1.5), torch.tensor(3), [0])
        watch.check(1, norm, may_overflow=True)

    for _ in range(MOST_OVERFLOWS):
        step(math.inf)
    step(1.0)
    for _ in range(MOST_OVERFLOWS):
        step(math.inf)
    with pytest.raises(TrainError, match="norm is inf"):
        step(math.inf)
