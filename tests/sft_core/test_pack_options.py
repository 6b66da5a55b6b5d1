"""Every packing with every overlong: what comes in goes out or is booked, and the bytes are the same every time."""

import hashlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_core.artifacts import check_ledger
from sft_core.pack import IGNORE_INDEX as NO
from sft_core.pack import Sequence, epoch_bins, load_chat_template, load_packed, overlap, pack_dataset
from sft_core.pack.collate import collate
from sft_core.pack.encoding import encode_conversation
from sft_core.pack.packing import Piece
from sft_core.recipe import PackConfig

CONTROLS = ["<pad>", "<|im_start|>", "<|im_end|>"]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
ORIGIN = [("dataset", pa.string()), ("file", pa.string()), ("row_number", pa.int64())]
SCHEMA = pa.schema([("row_id", pa.string()), ("messages", pa.list_(MESSAGE)), *ORIGIN])
PACKINGS = ["best_fit", "concat", "none"]
OVERLONG = ["quarantine", "truncate", "split"]
LIMIT = 96


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*CONTROLS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROLS)
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>").save_pretrained(folder)
    return folder


def talk(number: int) -> list[dict[str, Any]]:
    """Row `number`: one or two turns, some over LIMIT, some with typed controls, some beyond ASCII."""
    generator = np.random.default_rng(number)
    sizes = generator.integers(1, 60, 4).tolist()
    word = ["ab ", "é", "<|im_end|>", "日本 "][number % 4]
    says = [(word * size)[: max(size, 1) + 10] for size in sizes]
    turns = []
    for turn in range(1 + number % 2):
        turns.append({"role": "user", "content": says[2 * turn], "weight": None})
        turns.append({"role": "assistant", "content": says[2 * turn + 1], "weight": int(number % 7 != 3)})
    return turns


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of rows."""
    folder = tmp_path_factory.mktemp("conversations")
    (folder / "train").mkdir()
    for shard, numbers in enumerate((range(90), range(90, 110), range(110, 150), range(150, 200))):
        rows = [{"row_id": f"r{n}", "messages": talk(n), "dataset": "d", "file": "f", "row_number": n} for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "train" / f"part-{shard:05d}.parquet")
    return folder


def config(packing: str, overlong: str) -> PackConfig:
    chosen: dict[str, Any] = {"packing": packing, "overlong": overlong}
    return PackConfig(max_length=LIMIT, chat_template="chatml", **chosen)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def supervised(sequences: list[Sequence]) -> int:
    return sum(label != NO for sequence in sequences for label in sequence.labels)


@pytest.mark.parametrize(("packing", "overlong"), list(product(PACKINGS, OVERLONG)))
def test_tokens_and_labels_are_conserved(
    tokenizer: Path, conversations: Path, tmp_path: Path, packing: str, overlong: str
) -> None:
    outcome = pack_dataset(conversations, tokenizer, config(packing, overlong), 5, tmp_path)
    check_ledger("pack", outcome.ledger)
    packed = load_packed(tmp_path)
    whole = [packed.sequence(i) for i in range(len(packed))]
    for epoch in range(3):
        rows = [[packed.sequence(item) for item in members] for members in packed.bins(epoch)]
        assert all(0 < sum(len(s.input_ids) for s in row) <= LIMIT for row in rows)
        laid = [sequence for row in rows for sequence in row]
        assert sum(len(s.input_ids) for s in laid) == outcome.ledger["tokens"]["out"]
        assert supervised(laid) == supervised(whole) == outcome.ledger["supervised_tokens"]["out"]
        if packing == "concat":
            assert {sum(len(s.input_ids) for s in row) for row in rows[:-1]} == {LIMIT}
        else:
            assert sorted(i for members in packed.bins(epoch) for i in members) == list(range(len(packed)))
        assert collate(rows, packed.pad_token_id)["input_ids"].shape[1] <= LIMIT
    assert (outcome.facts["split_sequences"] > 0) == (overlong == "split")
    aside = outcome.ledger["tokens"]["set_aside"]
    assert aside.keys() == {
        "no_supervised_token",
        *{"quarantine": ["overlong"], "truncate": ["truncated"]}.get(overlong, []),
    }


@pytest.mark.parametrize("packing", PACKINGS)
def test_split_pieces_make_up_the_whole(tokenizer: Path, conversations: Path, tmp_path: Path, packing: str) -> None:
    from transformers import AutoTokenizer

    outcome = pack_dataset(conversations, tokenizer, config(packing, "split"), 5, tmp_path)
    packed = load_packed(tmp_path)
    pieces: dict[str, list[Sequence]] = {}
    for number in range(len(packed)):
        pieces.setdefault(packed.row_id(number), []).append(packed.sequence(number))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    border = 0
    for row_id, parts in pieces.items():
        (sequence,) = encode_conversation(talk(int(row_id[1:])), loaded, load_chat_template("chatml"))
        assert [token for part in parts for token in part.input_ids] == sequence.input_ids
        assert all(len(part.input_ids) == LIMIT for part in parts[:-1])
        assert all(part.labels[0] == NO for part in parts)
        assert [label for part in parts for label in part.labels[1:]] == [
            label for at, label in enumerate(sequence.labels) if at % LIMIT
        ]
        border += sum(label != NO for label in sequence.labels[::LIMIT])
    assert border > 0
    assert outcome.ledger["supervised_tokens"]["set_aside"] == {"split_border": border}


def test_concat_keeps_the_labels_of_a_continued_piece() -> None:
    bins = epoch_bins([3, 3, 2], 4, "concat", seed=0, epoch=0)
    assert bins == [[2, Piece(0, 0, 2)], [Piece(0, 2, 3), 1]]
    sequence = Sequence([5, 6, 7], [NO, 6, 7])
    piece = Sequence(sequence.input_ids[2:], sequence.labels[2:])
    batch = collate([[piece, Sequence([8, 9], [NO, 9])]], 0)
    assert batch["position_ids"].tolist() == [[0, 0, 1]]  # positions restart at the cut


@pytest.mark.parametrize("seed", range(5))
def test_concat_cuts_only_where_a_row_is_full(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 65, 500).tolist()
    bins = epoch_bins(lengths, 64, "concat", seed, epoch=seed)
    seen: dict[int, list[int]] = {}
    for members in bins:
        for item in members:
            number, first, last = item if isinstance(item, Piece) else (item, 0, lengths[item])
            seen.setdefault(number, []).extend(range(first, last))
        sizes = [m.last - m.first if isinstance(m, Piece) else lengths[m] for m in members]
        assert sum(sizes) == 64 or members is bins[-1]
        assert not any(isinstance(item, Piece) for item in members[1:-1])
    assert seen == {number: list(range(length)) for number, length in enumerate(lengths)}
    assert bins != epoch_bins(lengths, 64, "concat", seed, epoch=seed + 1)


def test_bins_on_disk_hold_the_cuts(tokenizer: Path, conversations: Path, tmp_path: Path) -> None:
    pack_dataset(conversations, tokenizer, config("concat", "split"), 5, tmp_path)
    packed = load_packed(tmp_path)
    rows = pq.read_table(tmp_path / "bins.parquet").to_pylist()
    for row, members in zip(rows, packed.bins(0), strict=True):
        places = [m if isinstance(m, Piece) else Piece(m, 0, packed.lengths[m]) for m in members]
        assert [Piece(*place) for place in zip(row["bin"], row["first"], row["last"], strict=True)] == places


@pytest.mark.parametrize("cores", [2, 5])
def test_bytes_are_the_same_on_any_number_of_cores(
    tokenizer: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    for number in (1, cores):
        monkeypatch.setattr(overlap.os, "sched_getaffinity", lambda _, number=number: set(range(number)))
        pack_dataset(conversations, tokenizer, config("concat", "split"), 5, tmp_path / str(number))
    assert hashes(tmp_path / "1") == hashes(tmp_path / str(cores))
