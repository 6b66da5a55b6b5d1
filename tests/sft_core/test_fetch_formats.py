"""fetch: every format, whole or broken, to rows."""

import csv
import doctest
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.errors import SourceError
from sft_core.fetch import formats
from tests.sft_core.fetched import ROW, fetch, fetch_bytes, texts


class TestJson:
    def test_lines_keep_text_key_order_and_line_numbers(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.jsonl", f'{ROW}\n\n{{"a":  2}}\n[{{"role": "user"}}]'.encode())
        assert rows == [
            (ROW, "a.jsonl", 1, None),
            ('{"a":  2}', "a.jsonl", 3, None),
            ('[{"role": "user"}]', "a.jsonl", 4, None),
        ]

    def test_bom_and_crlf(self, tmp_path):
        assert texts(fetch_bytes(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')) == [
            '{"a": 1}',
            '{"a": 2}',
        ]

    def test_nel_and_line_separator_do_not_end_a_line(self, tmp_path):
        line = '{"a": "x\u0085y\u2028z"}'
        assert texts(fetch_bytes(tmp_path, "a.jsonl", f"{line}\n{line}\n".encode())) == [line, line]

    def test_broken_lines_are_kept_with_their_problem(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": \\d}\n{"a": "\xff"}\n{"a": ' + b"[" * 100_000)
        assert [(number, problem and problem.split(" at ")[0]) for _, _, number, problem in rows[:3]] == [
            (1, None),
            (2, "not_json: Expecting value"),
            (3, "not_utf8: byte 0xff"),
        ]
        assert rows[2][0] == '{"a": "\\xff"}'
        assert rows[3][3].startswith("not_json: ")

    def test_array_elements_keep_their_text(self, tmp_path):
        content = f'\ufeff[\n  {ROW},\n  {{"a":\n    [1, 2]}}, [3],"x" , 5]\n'.encode()
        rows = fetch_bytes(tmp_path, "a.json", content)
        assert texts(rows) == [ROW, '{"a":\n    [1, 2]}', "[3]", '"x"', "5"]
        assert [row[2] for row in rows] == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a"])
    def test_array_in_one_line(self, tmp_path, name):
        assert texts(fetch_bytes(tmp_path, name, b'[{"a": 1}, {"a": 2}]')) == ['{"a": 1}', '{"a": 2}']

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_array_over_many_lines(self, tmp_path, name):
        assert texts(fetch_bytes(tmp_path, name, b'[{"a": 1},\n{"a": 2}\n]')) == ['{"a": 1}', '{"a": 2}']

    def test_lines_named_json(self, tmp_path):
        assert texts(fetch_bytes(tmp_path, "a.json", b'{"a": 1}\n{"a": 2}\n')) == ['{"a": 1}', '{"a": 2}']

    def test_lines_named_json_whose_first_is_broken(self, tmp_path):
        assert [row[3] is None for row in fetch_bytes(tmp_path, "a.json", b'{"a": \n{"a": 2}\n')] == [False, True]

    def test_message_lists_named_json(self, tmp_path):
        assert len(fetch_bytes(tmp_path, "a.json", b'[{"role": "user"}]\n[{"role": "user"}]\n')) == 2

    def test_a_single_object_is_one_row(self, tmp_path):
        assert texts(fetch_bytes(tmp_path, "a.json", b'{\n "a": 1\n}\n')) == ['{\n "a": 1\n}']

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('[{"a": 1},\n {"a": 2},\n]', "line 3, column 1: a comma before the closing ]"),
            ('[{"a": 1},\n {"a": 2}\n', "line 3, column 1: the file ends before"),
            ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: expected , or ]"),
            ('[{"a": 1},\n {"a" 2}]', "line 2, column 7: Expecting ':' delimiter"),
            ("[1] 2", "line 1, column 5: text after"),
        ],
    )
    def test_a_broken_array_names_its_place(self, tmp_path, content, message):
        with pytest.raises(SourceError, match=r"^a\.json: not JSON at " + message.replace("]", r"\]")):
            fetch_bytes(tmp_path, "a.json", content.encode())

    def test_an_array_is_read_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sft_core.fetch.json_rows.READ_CHARACTERS", 7)
        rows = [{"a": "x" * size, "b": [size, {"c": None}]} for size in range(40)]
        assert [
            json.loads(t) for t in texts(fetch_bytes(tmp_path, "a.json", json.dumps(rows, indent=1).encode()))
        ] == rows
        with pytest.raises(SourceError, match="line 363, column 1: text after"):
            fetch_bytes(tmp_path, "b.json", json.dumps(rows, indent=1).encode() + b"\n7")

    def test_an_array_that_is_not_utf8(self, tmp_path):
        with pytest.raises(SourceError, match=r"a\.json: not UTF-8: byte 0xff at offset 10 \(line 2\)"):
            fetch_bytes(tmp_path, "a.json", b'[\n{"a": "x\xff"}]')


class TestTables:
    def test_csv_with_quoted_newlines(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.csv", b'\xef\xbb\xbfa,b\r\n1,"x\ny"\r\n\r\n2,\r\n3\r\n')
        assert rows == [
            ('{"a": "1", "b": "x\\ny"}', "a.csv", 2, None),
            ('{"a": "2", "b": ""}', "a.csv", 5, None),
            ('["3"]', "a.csv", 6, "bad_csv_row: 1 fields, the header has 2"),
        ]

    def test_csv_with_a_row_that_is_none(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.csv", b"a,b\n1,2\n3,4\r5\n6,7")
        assert [(row[0], *row[2:]) for row in rows[::2]] == [
            ('{"a": "1", "b": "2"}', 2, None),
            ('{"a": "6", "b": "7"}', 4, None),
        ]
        assert rows[1][:3] == ("3,4\r5\n", "a.csv", 3)
        assert rows[1][3].startswith("bad_csv_row: new-line character seen in unquoted field")

    def test_csv_with_a_quote_that_another_rows_quote_closes(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.csv", b'a,b\n1,"2\n3,4\n5,"6"\n7," 8" 9\n')
        assert rows == [
            ('1,"2\n3,4\n5,"6"\n', "a.csv", 2, "bad_csv_row: ',' expected after '\"'"),
            ('{"a": "7", "b": " 8 9"}', "a.csv", 5, None),
        ]

    def test_csv_that_begins_with_blank_lines(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.csv", b"\n\r\na\n\n1\n")
        assert rows == [('{"a": "1"}', "a.csv", 5, None)]

    @pytest.mark.parametrize("end", [b"", b"\n", b"\ne,f\ng,h\n"])
    def test_csv_with_a_quote_that_nothing_closes(self, tmp_path, end):
        with pytest.raises(
            SourceError, match=r"a\.csv: the row that begins in line 3 opens a quote that nothing closes"
        ):
            fetch_bytes(tmp_path, "a.csv", b'a,b\n1,2\nc,"d' + end)

    def test_csv_with_a_long_field(self, tmp_path):
        assert len(fetch_bytes(tmp_path, "a.csv", b"a\n" + b"x" * 200_000)[0][0]) == 200_009

    def test_csv_that_is_not_utf8(self, tmp_path):
        with pytest.raises(SourceError, match=r"a\.csv: not UTF-8: byte 0xc4 at offset 4 \(line 2\).*iconv -f GB18030"):
            fetch_bytes(tmp_path, "a.csv", b"a\n1\n\xc4\xe3\n".replace(b"1\n", b"1,", 1))

    def test_csv_that_names_a_column_twice(self, tmp_path):
        with pytest.raises(SourceError, match="names these columns twice: 'a'"):
            fetch_bytes(tmp_path, "a.csv", b"a,a\n1,2\n")

    @pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
    def test_parquet_and_arrow(self, tmp_path, kind):
        table = pa.table({"z": ["\u4f60", None], "a": [[{"b": 1.5}], []], "day": pa.array([0, 1], pa.date32())})
        path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            writer = (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema)
            with writer:
                writer.write_table(table)
        assert fetch(path, tmp_path / "out") == [
            ('{"z": "\u4f60", "a": [{"b": 1.5}], "day": "1970-01-01"}', path.name, 1, None),
            ('{"z": null, "a": [], "day": "1970-01-02"}', path.name, 2, None),
        ]

    def test_a_torn_parquet_file(self, tmp_path):
        pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
        content = (tmp_path / "a.parquet").read_bytes()
        with pytest.raises(SourceError, match=r"a\.parquet: damaged, or cut short"):
            fetch_bytes(tmp_path, "a.parquet", content[:-20])

    def test_what_is_not_what_its_name_says(self, tmp_path):
        with pytest.raises(SourceError, match="named parquet, but its first bytes are"):
            fetch_bytes(tmp_path, "a.parquet", b'{"a": 1}\n')
        with pytest.raises(SourceError, match="git lfs pull"):
            fetch_bytes(tmp_path, "b.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(SourceError, match="iconv -f UTF-16"):
            fetch_bytes(tmp_path, "c.json", '[{"a": 1}]'.encode("utf-16"))
        with pytest.raises(SourceError, match="notes.txt: unknown format"):
            fetch_bytes(tmp_path, "notes.txt", b"Dear all,\n")


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"b": f"\u4f60 {n}\r\n\u0085\"',", "a": str(n)} for n in range(30)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["b", "a"])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "a.json").write_bytes(json.dumps(rows, indent=2).encode())
    (tmp_path / "a.csv").write_bytes(table.getvalue().encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.glob("a.*")):
        assert [json.loads(text) for text in texts(fetch(path, tmp_path / "out" / path.name))] == rows, path.name


@pytest.mark.parametrize("seed", range(20))
def test_every_line_that_is_not_blank_becomes_a_row(tmp_path, seed):
    draw = random.Random(seed)
    pieces = [b"{", b"}", b'"a"', b":", b"1", b"[", b"]", b",", b"\xff", b"\xc2\x85", b"\r", b" ", b"\\", b"\x00"]
    lines = [b"".join(draw.choices(pieces, k=draw.randint(0, 6))) for _ in range(60)]
    rows = fetch_bytes(tmp_path, "a.jsonl", b'{"a": 1}\n' + b"\n".join(lines))
    assert [row[2] for row in rows] == [1] + [n for n, line in enumerate(lines, start=2) if line.strip()]


def test_doctests():
    assert doctest.testmod(formats).failed == 0
