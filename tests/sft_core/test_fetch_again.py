"""fetch: a JSON Lines source that was fetched before is parsed again only where it is new, and nothing tells."""

import bz2
import gzip
import json
import random
from pathlib import Path

import pytest

from sft_core import shard_rows
from sft_core.errors import SourceError
from sft_core.fetch import cuts, fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig
from sft_core.shards import EarlierFolder, Sharding, read_shard_list
from tests.sft_core.fetched import contents, fetch_again, located

COUNT = 3000
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    """About forty shards for COUNT rows; every file is a large one."""
    monkeypatch.setattr(shard_rows, "ROWS_PER_CUT", 64)
    monkeypatch.setattr(shard_rows, "LEAST_ROWS", 16)
    monkeypatch.setattr(shard_rows, "MOST_ROWS", 256)
    monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", 0)


def line(number: int) -> bytes:
    return json.dumps({"n": number, "text": f"\u4f60{number * 7919 % 1000}"}, ensure_ascii=False).encode() + b"\n"


def rows_of(name: str, content: bytes) -> list[tuple]:
    """What must be read of a file, told by its bytes alone."""
    lines = enumerate(content.removeprefix(BOM).decode().split("\n"), start=1)
    return [(name, number, text.removesuffix("\r")) for number, text in lines if text.strip()]


def fetch_twice(tmp_path: Path, before: bytes, after: bytes, name: str = "a.jsonl", pack=bytes) -> tuple[int, int]:
    """(shards made, shards in all) when the source was `before` and became `after`."""
    source = tmp_path / "source" / name
    source.parent.mkdir()
    source.write_bytes(pack(before))
    total = fetch_again(source, tmp_path / "before")
    assert total == len(read_shard_list(tmp_path / "before"))
    source.write_bytes(pack(after))
    made = fetch_again(source, tmp_path / "after", tmp_path / "before")
    fetch_again(source, tmp_path / "anew")
    assert contents(tmp_path / "after") == contents(tmp_path / "anew")
    assert located(tmp_path / "after") == rows_of(name, after)
    return made, len(read_shard_list(tmp_path / "after"))


LINES = [line(number) for number in range(COUNT)]
NEW = [line(number) for number in range(COUNT, COUNT + COUNT // 100)]
WHOLE = b"".join(LINES)
HALF = COUNT // 2
EDITS = {
    "unchanged": (LINES, 0),
    "appended": (LINES + NEW, 4),
    "inserted": (LINES[:HALF] + NEW + LINES[HALF:], 5),
    "at the front": (NEW + LINES, 5),
    "deleted": (LINES[:HALF] + LINES[HALF + COUNT // 100 :], 2),
    "one changed": (LINES[:HALF] + NEW[:1] + LINES[HALF + 1 :], 2),
    "blank lines": (LINES[:HALF] + [b"\n", b" \r\n"] + LINES[HALF:], 2),
    "a broken line": (LINES[:HALF] + [b'{"n": \n'] + LINES[HALF:], 2),
}


class TestEdits:
    @pytest.mark.parametrize("edit", EDITS)
    def test_only_the_shards_around_it_are_made(self, tmp_path, edit):
        lines, most = EDITS[edit]
        made, total = fetch_twice(tmp_path, WHOLE, b"".join(lines))
        assert made <= most
        assert (made > 0) == (most > 0)
        assert total > 30

    def test_a_broken_line_is_known_by_its_problem_when_its_shard_is_taken(self, tmp_path):
        content = b"".join([*LINES[:HALF], b'{"n": \n', *LINES[HALF:]])
        fetch_twice(tmp_path, content, content + LINES[0])
        (row,) = [row for row in read_shards(tmp_path / "after" / "rows") if row["problem"]]
        assert (row["row_number"], row["problem"][:9]) == (HALF + 1, "not_json:")
        outcome = fetch_dataset(
            DatasetConfig(path=str(tmp_path / "source" / "a.jsonl")),
            tmp_path / "third",
            sharding=Sharding(EarlierFolder(tmp_path / "after")),
        )
        assert outcome.facts["rows_with_problem"] == 1
        assert outcome.ledger["rows"]["out"] == COUNT + 2

    @pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
    def test_compressed(self, tmp_path, suffix, pack):
        made, _ = fetch_twice(tmp_path, WHOLE, b"".join(EDITS["inserted"][0]), f"a.jsonl.{suffix}", pack)
        assert 0 < made <= 5

    def test_compressed_and_cut_short(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(WHOLE)[:-9])
        with pytest.raises(SourceError, match=r"a\.jsonl\.gz: damaged, or cut short: EOFError"):
            fetch_again(tmp_path / "a.jsonl.gz", tmp_path / "out")

    def test_named_json(self, tmp_path):
        made, _ = fetch_twice(tmp_path, WHOLE, WHOLE + NEW[0], "a.json")
        assert made == 1

    def test_crlf(self, tmp_path):
        before = WHOLE.replace(b"\n", b"\r\n")
        made, _ = fetch_twice(tmp_path, before, NEW[0] + before)
        assert 0 < made <= 2

    def test_a_byte_order_mark_belongs_to_no_row(self, tmp_path):
        made, _ = fetch_twice(tmp_path, WHOLE, BOM + WHOLE)
        assert made == 0

    def test_a_byte_order_mark_inside_is_text(self, tmp_path):
        fetch_twice(tmp_path, WHOLE, b"".join([*LINES[:HALF], BOM, *LINES[HALF:]]))
        problems = [row["row_number"] for row in read_shards(tmp_path / "after" / "rows") if row["problem"]]
        assert problems == [HALF + 1]

    def test_a_byte_order_mark_that_begins_a_shard_is_text(self, tmp_path, monkeypatch):
        for name, value in (("LEAST_ROWS", 1), ("MOST_ROWS", 1)):
            monkeypatch.setattr(shard_rows, name, value)
        fetch_twice(tmp_path, b"".join(LINES[:3]), LINES[0] + BOM + LINES[1] + LINES[2])
        assert [bool(row["problem"]) for row in read_shards(tmp_path / "after" / "rows")] == [False, True, False]

    def test_a_shard_of_blank_lines_alone_is_none(self, tmp_path):
        before = LINES[0] + b"\n" * 2000 + LINES[1]
        _, total = fetch_twice(tmp_path, before, before + LINES[2])
        assert 1 <= total <= 2
        assert all(shard.facts["rows"] for shard in read_shard_list(tmp_path / "after"))

    def test_a_last_line_that_gets_its_newline(self, tmp_path):
        made, _ = fetch_twice(tmp_path, WHOLE.removesuffix(b"\n"), WHOLE)
        assert made == 1


class TestFolders:
    def test_files_renamed_and_added(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "b.jsonl").write_bytes(WHOLE)
        (source / "d.jsonl").write_bytes(b"".join(NEW))
        total = fetch_again(source, tmp_path / "before")
        (source / "b.jsonl").rename(source / "c.jsonl")
        assert fetch_again(source, tmp_path / "renamed", tmp_path / "before") == 0
        (source / "a.jsonl").write_bytes(NEW[0])
        assert fetch_again(source, tmp_path / "added", tmp_path / "renamed") == 1
        assert len(read_shard_list(tmp_path / "added")) == total + 1
        fetch_again(source, tmp_path / "anew")
        assert contents(tmp_path / "added") == contents(tmp_path / "anew")
        parts = {"a.jsonl": NEW[0], "c.jsonl": WHOLE, "d.jsonl": b"".join(NEW)}
        assert located(tmp_path / "added") == [row for item in parts.items() for row in rows_of(*item)]

    @pytest.mark.parametrize("seed", range(3))
    def test_any_edits_of_any_files(self, tmp_path, monkeypatch, seed):
        draw = random.Random(seed)
        monkeypatch.setattr(shard_rows, "ROWS_PER_CUT", 8)
        monkeypatch.setattr(shard_rows, "LEAST_ROWS", draw.choice([1, 4]))
        monkeypatch.setattr(shard_rows, "MOST_ROWS", 24)
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", draw.choice([0, 400, 4000]))
        monkeypatch.setattr(cuts, "GROUP_BYTES", 8000)
        monkeypatch.setattr(cuts, "LEAST_FILE_BYTES", draw.choice([1, 2000]))
        source, files = tmp_path / "source", {f"f{n:02}.jsonl": LINES[: n * n] for n in range(3, 13)}
        source.mkdir()
        earlier = None
        for turn in range(6):
            for _ in range(draw.randint(1, 3)):
                edit(files, draw)
            for path in source.iterdir():
                path.unlink()
            for name, lines in files.items():
                (source / name).write_bytes(b"".join(lines))
            fetch_again(source, tmp_path / f"again-{turn}", earlier)
            fetch_again(source, tmp_path / f"anew-{turn}")
            earlier = tmp_path / f"again-{turn}"
            assert contents(earlier) == contents(tmp_path / f"anew-{turn}")
            expected = [row for name in sorted(files) for row in rows_of(name, b"".join(files[name]))]
            assert located(earlier) == expected


def edit(files: dict[str, list[bytes]], draw: random.Random) -> None:
    """One change of one file."""
    name = draw.choice(sorted(files))
    lines = files[name]
    at = draw.randint(0, len(lines))
    match draw.randrange(6):
        case 0:
            files[name] = lines[:at] + draw.choices(NEW, k=draw.randint(1, 40)) + lines[at:]
        case 1:
            files[name] = lines[:at] + lines[at + draw.randint(1, 40) :]
        case 2:
            files[f"f{draw.randrange(100):02}.jsonl"] = files.pop(name)
        case 3:
            files[f"g{draw.randrange(100):02}.jsonl"] = lines[:at]
        case 4:
            files[name] = [*lines[:at], b"\n", b'{"a": }\n', b"\r\n", *lines[at:]]
        case _ if len(files) > 2:
            del files[name]
        case _:
            files[name] = lines[:at]
