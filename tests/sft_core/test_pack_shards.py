"""The step shard by shard: taken or made, here or in other processes, the artifact has the same bytes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.artifacts import StoredFile, check_ledger
from sft_core.errors import DataError
from sft_core.fingerprint import hash_file
from sft_core.pack import load_packed, pack_dataset
from sft_core.recipe import PackConfig
from sft_core.shards import EarlierFolder, Made, Mapper, Shard, Sharding, read_shard_list

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
ORIGIN = [("file", pa.int32()), ("row_number", pa.int64())]
SCHEMA = pa.schema([("row_id", pa.string()), ("messages", pa.list_(MESSAGE)), *ORIGIN])
CONFIG = PackConfig(max_length=96, chat_template="chatml")
ROWS = 40
LONG = 7
"""Every so many rows one is over `max_length`."""


def row(number: int) -> dict[str, Any]:
    answer = "long " * 40 if number % LONG == 3 else f"yes {number}"
    messages = [
        {"role": "user", "content": f"ask {number}", "weight": None},
        {"role": "assistant", "content": answer, "weight": 1},
    ]
    return {"row_id": f"r{number}", "messages": messages, "file": 0, "row_number": number}


def write(folder: Path, *shards: range, weight: float = 1.0, dataset: str = "d") -> Path:
    """Conversations as normalize writes them, each shard from rows of its own; rows count from the shard's first."""
    (folder / "train").mkdir(parents=True)
    listed, first = [], 0
    for number, rows in enumerate(shards):
        path = folder / "train" / f"part-{number:05d}.parquet"
        entries = [{**row(at), "row_number": k} for k, at in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(entries, schema=SCHEMA), path)
        files = {"train/*.parquet": StoredFile(path.stat().st_size, hash_file(path))}
        place = {"files": ["a.jsonl"], "first_row": first, "dataset": dataset, "weight": weight}
        listed.append(asdict(Shard(path.stem, f"key{number}", files, {}, place)))
        first += len(rows)
    (folder / "shards.json").write_text(json.dumps(listed))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counted(made: list[str]) -> Mapper:
    """`map` that notes which shards it was given."""

    def mapper(work: Callable[[Any], Made], arguments: Sequence[Any]) -> Iterator[Made]:
        made.extend(argument.path.stem for argument in arguments)
        return map(work, arguments)

    return mapper


PARTS = (range(40), range(40, 80), range(80, 100))


@pytest.fixture
def earlier(tmp_path: Path, tiny_model: Path) -> Path:
    pack_dataset(write(tmp_path / "in", *PARTS), tiny_model, CONFIG, 42, tmp_path / "earlier")
    return tmp_path / "earlier"


def test_taken_or_made_the_bytes_are_the_same(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    made: list[str] = []
    outcomes = [
        pack_dataset(tmp_path / "in", tiny_model, CONFIG, 42, tmp_path / name, sharding)
        for name, sharding in (("made", Sharding()), ("taken", Sharding(EarlierFolder(earlier), counted(made))))
    ]
    assert hashes(tmp_path / "made") == hashes(tmp_path / "taken") == hashes(earlier)
    assert outcomes[0] == outcomes[1]
    check_ledger("pack", outcomes[0].ledger)
    assert made == []


@pytest.mark.timeout(300)
def test_the_bytes_are_the_same_from_other_processes(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        pack_dataset(tmp_path / "in", tiny_model, CONFIG, 42, tmp_path / "pool", Sharding(mapper=pool.map))
    assert hashes(tmp_path / "pool") == hashes(earlier)


def test_new_rows_make_their_shards_only(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    grown = write(tmp_path / "grown", range(200, 210), *PARTS, range(100, 110))  # before and behind
    made: list[str] = []
    pack_dataset(grown, tiny_model, CONFIG, 42, tmp_path / "out", Sharding(EarlierFolder(earlier), counted(made)))
    assert made == ["part-00000", "part-00004"]
    pack_dataset(grown, tiny_model, CONFIG, 42, tmp_path / "anew")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "anew")
    lines = (tmp_path / "out" / "quarantine" / "part-00000.jsonl").read_text().splitlines()
    places = [
        (entry["row_id"], entry["dataset"], entry["file"], entry["row_number"]) for entry in map(json.loads, lines)
    ]
    order = [*range(200, 210), *range(110)]
    assert places == [(f"r{n}", "d", "a.jsonl", k) for k, n in enumerate(order) if n % LONG == 3]


@pytest.mark.parametrize(
    ("changed", "seed", "all_made"),
    [
        ({"packing": "concat"}, 42, False),
        ({}, 43, False),
        ({"max_length": 97}, 42, True),
        ({"chat_template": "qwen_chat"}, 42, True),
        ({"overlong": "split"}, 42, True),
    ],
)
def test_what_decides_tokens_makes_all_shards_anew(
    tmp_path: Path, tiny_model: Path, earlier: Path, changed: dict[str, Any], seed: int, all_made: bool
) -> None:
    made: list[str] = []
    sharding = Sharding(EarlierFolder(earlier), counted(made))
    config = PackConfig(**{**CONFIG.model_dump(), **changed})
    pack_dataset(tmp_path / "in", tiny_model, config, seed, tmp_path / "out", sharding)
    assert made == (["part-00000", "part-00001", "part-00002"] if all_made else [])
    pack_dataset(tmp_path / "in", tiny_model, config, seed, tmp_path / "anew")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "anew")


@pytest.mark.parametrize("name", ["sequences/part-00001.parquet", "refused/part-00001.jsonl"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, tiny_model: Path, earlier: Path, name: str, damage: str) -> None:
    sound, path = hashes(earlier), earlier / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    pack_dataset(tmp_path / "in", tiny_model, CONFIG, 42, tmp_path / "out", Sharding(EarlierFolder(earlier)))
    assert hashes(tmp_path / "out") == sound


def test_weight_is_of_the_place_and_not_of_the_shard(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    made: list[str] = []
    heavy = write(tmp_path / "heavy", *PARTS, weight=2.5)
    sharding = Sharding(EarlierFolder(earlier), counted(made))
    outcome = pack_dataset(heavy, tiny_model, CONFIG, 42, tmp_path / "out", sharding)
    assert made == []
    packed = load_packed(tmp_path / "out")
    assert set(packed.weights.tolist()) == {2.5}
    assert outcome.facts["sequences"] == len(packed) == len([n for n in range(100) if n % LONG != 3])
    times = [[sum(members.count(i) for members in packed.bins(epoch)) for i in range(len(packed))] for epoch in (0, 1)]
    assert {a + b for a, b in zip(*times, strict=True)} == {5}
    assert set(times[0]) == {2, 3}
    assert outcome.facts["epoch_sequences"] == sum(times[0])
    assert [s.place["weight"] for s in read_shard_list(tmp_path / "out")] == [2.5] * 3


def test_an_overlong_row_is_named_by_its_place(tmp_path: Path, tiny_model: Path) -> None:
    config = PackConfig(max_length=96, chat_template="chatml", overlong="error")
    conversations = write(tmp_path / "in", range(3), range(100, 103), dataset="mine")  # 101 is over
    with pytest.raises(DataError, match=r"mine, a.jsonl, row 4: \d+ tokens, pack.max_length is 96"):
        pack_dataset(conversations, tiny_model, config, 42, tmp_path / "out")


def test_the_first_rows_are_proved_wherever_shards_are_made(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    made: list[str] = []
    config = PackConfig(max_length=96, chat_template=str(template))
    with pytest.raises(
        DataError, match=r"takes none of the conversations; no_stop: d, a.jsonl, row 0: message 1: no token that stops"
    ):
        pack_dataset(tmp_path / "in", tiny_model, config, 42, tmp_path / "o", Sharding(mapper=counted(made)))
    assert made == []


def test_rows_all_over_the_data_are_proved(tmp_path: Path, tiny_model: Path, earlier: Path) -> None:
    template = tmp_path / "endless_once.jinja"
    end = "{{ '' if m.content == 'yes 81' else '<|im_end|>' }}"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}")
    config = PackConfig(max_length=96, chat_template=str(template))
    said: list[str] = []
    pack_dataset(tmp_path / "in", tiny_model, config, 42, tmp_path / "o", Sharding(on_line=said.append))
    line, counted = said
    assert counted == "note: of 100 sequences are set aside: 14 overlong, 1 no_stop"
    assert line.startswith("note: rows are set aside by the chat template; no_stop: d, a.jsonl, row 81: message 1: ")
    assert line.endswith(". With pack.chat_template: chatml it is rendered")
