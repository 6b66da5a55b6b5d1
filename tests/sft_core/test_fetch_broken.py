"""fetch: broken lines are rows with a problem, a broken file is one SourceError, whatever its bytes."""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.errors import DataError, SourceError
from sft_core.fetch import cuts, fetch_dataset, json_rows, read_shards
from sft_core.recipe import DatasetConfig


def fetch_bytes(tmp_path: Path, name: str, content: bytes) -> list[tuple]:
    (tmp_path / name).write_bytes(content)
    fetch_dataset(DatasetConfig(path=str(tmp_path / name)), tmp_path / f"{name}.out")
    return [(row["row"], row["row_number"], row["problem"]) for row in read_shards(tmp_path / f"{name}.out" / "rows")]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as writer:
        writer.write(content)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("a.jsonl", content)
    return archive.getvalue()


CODECS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd, "zip": zipped}
LINES = (
    b'\xef\xbb\xbf{"a": "x\xc2\x85y"}\r\n'  # a BOM, U+0085 inside a text
    b"\r\n"
    b'{"a": "\xff"}\r\n'
    b'{"a": "\x00"}\r\n'
    b"\x00\x00\r\n"
    b'{"a": 1,}\n'
    b'{"a": "' + b"x" * 3_000_000 + b'"}\n'
    b'{"a": 2}'  # no newline
)


@pytest.mark.parametrize("small", [0, 1 << 40], ids=["large", "small"])
@pytest.mark.parametrize("suffix", ["", *CODECS])
def test_broken_lines_plain_and_compressed(tmp_path, monkeypatch, suffix, small):
    monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", small)
    name, content = (f"a.jsonl.{suffix}", CODECS[suffix](LINES)) if suffix else ("a.jsonl", LINES)
    rows = fetch_bytes(tmp_path, name, content)
    assert [(text[:20], number, problem) for text, number, problem in rows] == [
        ('{"a": "x\u0085y"}', 1, None),
        ('{"a": "\\xff"}', 3, "not_utf8: byte 0xff at byte 8 of the line"),
        ('{"a": "\x00"}', 4, "not_json: Invalid control character at column 8"),
        ("\x00\x00", 5, "not_json: Expecting value at column 1"),
        ('{"a": 1,}', 6, rows[4][2]),
        ('{"a": "xxxxxxxxxxxxx', 7, None),
        ('{"a": 2}', 8, None),
    ]
    assert rows[4][2].startswith("not_json: ")
    assert len(rows[5][0]) == 3_000_009


class TestArrays:
    def test_an_array_in_one_long_line_is_read_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(json_rows, "FIRST_PIECE", 64)
        rows = [n if n % 3 else {"a": "\u4f60\U0001f600" * n, "b": [-1.5e-300, True]} for n in range(1, 250)]
        for size in (1, 2, 7, 100):
            monkeypatch.setattr(json_rows, "READ_CHARACTERS", size)
            content = b"\xef\xbb\xbf  " + json.dumps(rows, ensure_ascii=False).encode()
            assert [json.loads(text) for text, _, _ in fetch_bytes(tmp_path, f"a{size}.json", content)] == rows

    @pytest.mark.parametrize("number", ["12", "-1.5e-300", "-Infinity", "true", '"\\ud83d\\ude00"'])
    def test_a_value_at_every_place_of_a_piece(self, tmp_path, monkeypatch, number):
        monkeypatch.setattr(json_rows, "FIRST_PIECE", 4)
        monkeypatch.setattr(json_rows, "READ_CHARACTERS", 1)
        for blanks in range(20):
            content = ("[" + " " * blanks + number + "," + number + " ,  [" + number + "]]").encode()
            rows = fetch_bytes(tmp_path, f"a{blanks}.json", content)
            assert [text for text, _, _ in rows] == [number, number, f"[{number}]"]

    def test_message_lists_in_long_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(json_rows, "FIRST_PIECE", 8)
        assert len(fetch_bytes(tmp_path, "a.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n')) == 2
        assert len(fetch_bytes(tmp_path, "b.json", b'{"role": "user"}\n{"role": "user"}\n')) == 2

    def test_a_broken_place_is_named_without_reading_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(json_rows, "FIRST_PIECE", 64)
        monkeypatch.setattr(json_rows, "READ_CHARACTERS", 64)
        content = b'[{"a": 1}, {"a" 2}, ' + b'{"a": 1}, ' * 50 + b"\xff]"  # the bad byte at the end is never reached
        with pytest.raises(SourceError, match=r"a\.json: not JSON at line 1, column 17: Expecting ':'"):
            fetch_bytes(tmp_path, "a.json", content)

    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_a_bad_byte_is_named_whatever_the_pieces(self, tmp_path, monkeypatch, size):
        monkeypatch.setattr(json_rows, "FIRST_PIECE", 4)
        monkeypatch.setattr(json_rows, "READ_CHARACTERS", size)
        with pytest.raises(SourceError, match=r"byte 0xe4 at offset 20 \(line 2\); find its encoding"):
            fetch_bytes(tmp_path, "a.json", b'[{"a": "1"},\n{"a": "\xe4\xbd"}]')
        with pytest.raises(SourceError, match=r"byte 0xe4 at offset 20 \(line 2\)"):
            fetch_bytes(tmp_path, "b.json", b'[{"a": "1"},\n{"a": "\xe4\xbd')


def whole_files() -> dict[str, bytes]:
    rows = [{"a": f"\u4f60{n}", "b": [{"c": None}, {"c": n}]} for n in range(40)]
    table = pa.Table.from_pylist(rows)
    parquet, stream, file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    for sink, new in ((stream, pa.ipc.new_stream), (file, pa.ipc.new_file)):
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole = {
        "array.json": json.dumps(rows).encode(),
        "lines.jsonl": lines,
        "table.csv": b"a,b\n" + b'1,"x\ny"\n' * 40,
        "table.parquet": parquet.getvalue(),
        "stream.arrow": stream.getvalue(),
        "file.arrow": file.getvalue(),
    }
    return {
        **whole,
        **{f"lines.jsonl.{suffix}": pack(lines) for suffix, pack in CODECS.items()},
        "t.parquet.gz": gzip.compress(whole["table.parquet"]),
        "s.arrow.zst": zstd(whole["stream.arrow"]),
    }


WHOLE = whole_files()
MAGIC = {
    ".parquet": [b"PAR1", b""],
    ".arrow": [b"ARROW1\0\0", b"\xff\xff\xff\xff", b""],
    ".gz": [b"\x1f\x8b\x08\0", b""],
}


def fetch_or_say_why(tmp_path: Path, name: str, content: bytes) -> None:
    """Rows, or one error that names the file; any other error fails the test."""
    message = ""
    try:
        fetch_bytes(tmp_path, name, content)
    except SourceError as error:
        message = str(error)
    except DataError as error:
        message = str(error) if "is empty" in str(error) else "?"
    assert not message or (name in message and len(message) < 2000), message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".json.zst", ".csv.zip"])
def test_random_bytes(tmp_path, monkeypatch, suffix):
    draw = random.Random(suffix)
    for number in range(60):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", draw.choice([0, 1 << 40]))
        start = draw.choice(MAGIC.get(suffix, [b"", b"[", b'{"a": ', b"[["]))
        fetch_or_say_why(tmp_path, f"f{number}{suffix}", start + draw.randbytes(draw.choice([0, 1, 7, 300, 5000])))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_with_a_few_bytes_changed_cut_or_doubled(tmp_path, monkeypatch, name):
    draw = random.Random(name)
    for number in range(60):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", draw.choice([0, 1 << 40]))
        content = bytearray(WHOLE[name])
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            match draw.randrange(3):
                case 0:
                    content[at] = draw.randrange(256)
                case 1:
                    del content[at : at + draw.randint(1, 40)]
                case _:
                    content[at:at] = content[at : at + draw.randint(1, 40)]
            content = content or bytearray(b"\0")
        fetch_or_say_why(tmp_path, f"n{number}-{name}", bytes(content))
