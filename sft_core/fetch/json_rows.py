"""Rows of JSON files: an array, JSON Lines, or values one after another (a single pretty-printed object is one row).

In: a binary file. Out: `RawRow`s whose `row` is the text as it stands in the file. Lines end at LF only: U+0085 and
U+2028 are ordinary characters in JSON (RFC 8259). Memory: one row, of MOST_ROW_BYTES at most. A longer line of JSON
Lines is a row with the problem `too_large`; in the other layouts a longer value is the file's error. An array is read a
megabyte (or one element, where that is longer) at a time, be it in one line or many: it may be larger than memory.
The `json` module sees an array's whole text only in its first line, to tell the layout, where that line has at most
FIRST_PIECE bytes (named .jsonl: MOST_ROW_BYTES).
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from sft_core.bounds import MOST_ROW_BYTES, nests_too_deeply
from sft_core.errors import SourceError
from sft_core.fetch.lines import BOM, LongLine, split_lines, without_bom
from sft_core.json_text import TOO_DEEP, may_nest, parse_json

BLANK = re.compile(r"[ \t\r\n]*")
READ_CHARACTERS = 1 << 20
FIRST_PIECE = 8 << 20
"""Bytes of the first line that tell the layout. A longer one that begins with [ is an array, if not named .jsonl."""
MOST_BLANK_LINES = 10_000
"""Before the first row; more of them tell no layout."""
CUT_CHARACTERS = 16
"""An error further than this before the end of what was read is no effect of the cut: longer than `-Infinity`."""


class RawRow(NamedTuple):
    """A row as it was read; `problem` is `reason: detail` when it could not be. `dropped_nulls`: see `arrow_values`."""

    row: str
    row_number: int
    problem: str | None = None
    dropped_nulls: int = 0


def read_json(file: IO[bytes], label: str, named_lines: bool) -> Iterator[RawRow]:
    """Rows of a JSON file of any layout. `named_lines`: its name says JSON Lines."""
    layout, head = json_layout(file, named_lines)
    if layout == "lines":
        pieces = itertools.chain(head, iter(lambda: file.read(READ_CHARACTERS), b""))
        return read_lines(without_bom(split_lines(pieces)))
    pieces = itertools.chain(head, iter(lambda: file.readline(READ_CHARACTERS), b""))
    scanner = _Scanner(decode_pieces(pieces, label), label)
    texts = scanner.elements() if layout == "array" else scanner.values()
    return (RawRow(text, number) for number, text in enumerate(texts, start=1))


def json_layout(file: IO[bytes], named_lines: bool) -> tuple[str, list[bytes]]:
    """`lines`, `array` or `values`, and what was read of the file to tell."""
    head: list[bytes] = []
    filled: list[bytes] = []
    while len(filled) < 2 and len(head) < MOST_BLANK_LINES and (line := file.readline(FIRST_PIECE)):
        is_cut = len(line) == FIRST_PIECE and not line.endswith(b"\n")
        begins_array = not filled and line.removeprefix(BOM).lstrip().startswith(b"[")
        if is_cut and not (begins_array and not named_lines):
            line += file.readline(MOST_ROW_BYTES - FIRST_PIECE)
            is_cut = len(line) == MOST_ROW_BYTES and not line.endswith(b"\n")
        head.append(line)
        if is_cut and begins_array:
            return "array", head
        if line.strip():
            filled.append(line.removeprefix(BOM))
        if is_cut:
            break
    return _layout(filled, named_lines), head


def decode_pieces(pieces: Iterable[bytes], label: str) -> Iterator[str]:
    """Text of a file that must be UTF-8, by lines or other pieces; a SourceError names the byte that is not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, first = 0, 1, True
    for piece in itertools.chain(pieces, [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            bad, line = error.object[error.start], line + error.object[: error.start].count(b"\n")
            raise SourceError(
                f"{label}: not UTF-8: byte 0x{bad:02x} at offset {offset - pending + error.start} (line {line}); "
                f"find its encoding and convert it, for example: iconv -f GB18030 -t UTF-8 {label} > NEW_FILE"
            ) from None
        offset += len(piece)
        line += piece.count(b"\n")
        if text:
            yield text.removeprefix("\ufeff") if first else text
            first = False


def _layout(head: list[bytes], named_lines: bool) -> str:
    """`lines`, `array` or `values`, from the first two lines that are not blank."""
    texts = [line.decode("utf-8", "replace").strip() for line in head]
    first = texts[0] if texts else ""
    value = _value(first)
    if first.startswith("["):
        if isinstance(value, list):  # one line, or a bare list of messages a line
            messages = bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
            return "lines" if len(texts) > 1 or messages else "array"
        return "lines" if named_lines and first != "[" and not first.endswith(",") else "array"
    if first.startswith("{") and value is None:
        second = texts[1] if len(texts) > 1 else ""
        readable = second.startswith("{") and _value(second) is not None
        return "lines" if readable or (named_lines and first != "{") else "values"
    return "lines"


def _value(text: str) -> Any:
    """The JSON value, or None where it is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def read_lines(lines: Iterable[bytes], before: int = 0) -> Iterator[RawRow]:
    """Rows of lines; `before` lines of the file came earlier. Blank lines have numbers too, and are no rows."""
    for number, line in enumerate(lines, start=before + 1):
        if isinstance(line, LongLine):
            yield RawRow(line.decode("utf-8", "backslashreplace"), number, too_large(line.size))
            continue
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if content.strip():
            yield _read_line(content, number)


def _read_line(line: bytes, number: int) -> RawRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not_utf8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return RawRow(line.decode("utf-8", "backslashreplace"), number, problem)
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        return RawRow(text, number, f"not_json: {error.msg.removesuffix(' at')} at column {error.pos + 1}")
    except ValueError as error:  # a number of thousands of digits, brackets nested too deeply
        return RawRow(text, number, f"not_json: {error}")
    return RawRow(text, number)


def too_large(size: int) -> str:
    """The problem of a row of `size` bytes."""
    return f"too_large: {size:,} bytes, and a row may have {MOST_ROW_BYTES:,}; a part of it is kept here"


class _Scanner:
    """Takes JSON values off a stream of text, each as its own text. `line` and `column` are where `text` begins."""

    def __init__(self, lines: Iterator[str], label: str) -> None:
        self.lines, self.label = lines, label
        self.text, self.at = "", 0
        self.line, self.column = 1, 1
        self.decode = json.JSONDecoder().raw_decode

    def elements(self) -> Iterator[str]:
        """The elements of one array."""
        self.peek()
        self.at += 1  # the opening bracket
        closed = self.peek() == "]"
        while not closed:
            yield self.value()
            match self.peek():
                case ",":
                    self.at += 1
                    if self.peek() == "]":
                        raise self.fault("a comma before the closing ]; remove it", self.at)
                case "]":
                    closed = True
                case "":
                    raise self.fault("the file ends before the closing ]", self.at)
                case _:
                    raise self.fault("expected , or ] here", self.at)
        self.at += 1
        if self.peek():
            raise self.fault("text after the closing ] of the array", self.at)

    def values(self) -> Iterator[str]:
        """Values one after another."""
        while self.peek():
            yield self.value()

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def value(self) -> str:
        """Text of the value that begins here, or a SourceError that says where it breaks."""
        self.peek()
        more = True
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos + CUT_CHARACTERS > len(self.text)
                if not (more and cut):
                    raise self.fault(error.msg, error.pos) from None
                self._check_size(len(self.text) - self.at)
                more = self._read_on()  # at the end of the file: once more, for the error's place
                continue
            except (ValueError, RecursionError) as error:
                raise self.fault(str(error), self.at) from None
            if more and end + CUT_CHARACTERS > len(self.text):  # a number may go on
                more = self._read_on()
                continue
            self._check_size(end - self.at)
            text = self.text[self.at : end]
            if may_nest(text) and nests_too_deeply(value):
                raise self.fault(TOO_DEEP, self.at)
            self.at = end
            return text

    def _check_size(self, size: int) -> None:
        if size > MOST_ROW_BYTES:
            raise self.fault(
                f"the value that begins here is over {MOST_ROW_BYTES:,} bytes, the most a row may have", self.at
            )

    def fault(self, what: str, position: int) -> SourceError:
        """Error at a position of `text`."""
        line, column = self._place(position)
        return SourceError(f"{self.label}: not JSON at line {line}, column {column}: {what}")

    def _place(self, position: int) -> tuple[int, int]:
        before = self.text[:position]
        newlines = before.count("\n")
        return self.line + newlines, len(before) - before.rfind("\n") if newlines else self.column + len(before)

    def _read_on(self) -> bool:
        """Drop what has been taken and read about as much as is left again, so that long values cost linear time."""
        self.line, self.column = self._place(self.at)
        self.text, self.at = self.text[self.at :], 0
        wanted, parts, size = max(READ_CHARACTERS, len(self.text)), [self.text], 0
        while size < wanted and (line := next(self.lines, None)) is not None:
            parts.append(line)
            size += len(line)
        self.text = "".join(parts)
        return size > 0
