"""A step that went bad ends the run, names its rows, and touches no checkpoint."""

import json
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

from sft_core import shard_rows
from sft_core.errors import TrainError
from sft_core.fetch import fetch_dataset
from sft_core.normalize import NormalizeSource, normalize_dataset
from sft_core.pack import load_packed, pack_dataset
from sft_core.recipe import DatasetConfig, NormalizeConfig, PackConfig
from sft_core.shard_rows import read_shards
from sft_core.shards import read_shard_list
from sft_core.train.checkpoints import newest_complete
from sft_core.train.stream import PackedStream
from sft_core.train.watch import MOST_OVERFLOWS, StepWatch, sources_of
from tests.sft_core.train_runs import config, make_packed, train, train_here

TWO_RANKS: dict[str, object] = {"deepspeed": "zero2", "num_processes": 2, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_conversations: Callable[..., Path]
) -> Path:
    """Conversation 17 holds the only `~`. A folder without shards.json, whose rows say themselves where they stand."""

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
def normalized(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Two files of 60 rows through the real steps, cut to short shards, packed. Row 41 of `b.jsonl` holds the only `~`;
    the first 20 rows of both files are copies."""
    folder = tmp_path_factory.mktemp("normalized")
    (folder / "rows").mkdir()
    for name in "ab":
        asked = [f"say {i if i < 20 else f'{name}{i}'}" for i in range(60)]
        if name == "b":
            asked[40] = "say ~"
        lines = [json.dumps({"input": text, "output": "w"}) for text in asked]
        (folder / "rows" / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_rows, "ROWS_PER_CUT", 16)
        patch.setattr(shard_rows, "LEAST_ROWS", 4)
        fetch_dataset(DatasetConfig(path=str(folder / "rows")), folder / "fetched")
    source = NormalizeSource(rows=folder / "fetched", map_fn="default", name="d")
    normalize_dataset([source], NormalizeConfig(near_duplicates=None), 0.05, 0, folder / "conversations")
    pack = PackConfig(max_length=128, chat_template="chatml")
    pack_dataset(folder / "conversations", tiny_model, pack, 42, folder / "packed")
    return folder / "packed"


def test_rows_are_named_as_in_the_source_and_copies_by_the_first(normalized: Path) -> None:
    conversations = normalized.parent / "conversations"
    assert len(read_shard_list(conversations)) > 2
    expected: dict[str, str] = {}
    asked = {}
    for row in read_shards(conversations / "train"):
        expected.setdefault(row["row_id"], f"d, {row['file']}, row {row['row_number']}")
        asked[row["messages"][0]["content"]] = row["row_id"]
    found = sources_of(conversations, [*expected, "unknown"])
    assert found == expected
    assert len(found) < len(list(read_shards(conversations / "train")))
    for text, (name, number) in {"say ~": ("b", 41), "say a30": ("a", 31), "say 7": ("a", 8)}.items():
        assert found[asked[text]] == f"d, {name}.jsonl, row {number}"
    assert sources_of(conversations, []) == {}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with NaN for `~`: fine until that token comes."""
    return poison(tiny_model, tmp_path_factory.mktemp("models") / "poisoned", math.nan)


@pytest.fixture(scope="module")
def too_large(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a number for `~` that bfloat16 rounds to infinity: no look at the weights finds that."""
    return poison(tiny_model, tmp_path_factory.mktemp("models") / "too_large", 3.4e38)


def poison(tiny_model: Path, folder: Path, value: float) -> Path:
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).encode("~")[0]] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "changes"), [("packed", {}), ("normalized", {}), ("normalized", TWO_RANKS)])
def test_a_nan_loss_names_its_rows_and_saves_nothing(
    folder: str, changes: dict[str, object], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    packed: Path = request.getfixturevalue(folder)
    poisoned: Path = request.getfixturevalue("too_large" if "dtype" in changes else "poisoned")
    section = config(max_steps=None, num_train_epochs=1, gradient_accumulation_steps=1, save_steps=1, **changes)
    with pytest.raises(TrainError, match=r"optimizer step \d+: loss is nan; nothing useful") as fault:
        (train if section.num_processes else train_here)(packed, poisoned, tmp_path, section)
    message = str(fault.value)
    bad = int(message.removeprefix("optimizer step ").partition(":")[0])
    dataset = load_packed(packed)
    token = AutoTokenizer.from_pretrained(poisoned).encode("~")[0]
    (number,) = (i for i in range(len(dataset)) if token in dataset.sequence(i).input_ids)
    named = "d, f, row 18" if folder == "packed" else "d, b.jsonl, row 41"
    assert f"{named} ({dataset.row_id(number)})" in message
    batch = next(row for row in dataset.bins(0) if number in row)
    assert message.count("d, ") == len(batch)  # that packed row's conversations and no others
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
