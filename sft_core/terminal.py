"""What is printed for a person cannot steer the terminal: texts of rows, files, models and errors are shown, not
obeyed.

In: any text. Out: the same text with what a terminal would act on, or nobody would see, shown as pictures (␛) and
escapes (`\\u202e`). Other writing stays as it is: accents, Arabic, emoji with their joiners, flags, colours of our own.

`say` is the door by which everything of ours is printed (a lint rule forbids `print`); `cli/console.py` the one for
tables and colours; `guard` the second lock behind both, for what libraries print: colours pass it, and nothing else.

    C0 and C1 controls, DEL     an escape sequence clears, retitles, writes the clipboard (OSC 52); CR and BS overwrite
    U+202A-202E, U+2066-2069    let a text be read in another order (N. Boucher and R. Anderson, Trojan Source, 2021)
    U+200B, U+2060-2064, U+FEFF, U+180E, U+2028/9, U+FFF9-B, tags U+E0000-E007F, lone surrogates     are not seen
"""

import io
import logging
import re
import sys
from typing import TextIO

from sft_core.log_records import change_message, change_records

JOINERS = "\u200c\u200d"
"""Of emoji, Persian, Hindi. Between Latin letters they hide."""
FLAG = "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"
"""England's, Scotland's: tags behind a black flag."""
UNSEEN = "\u200b\u2060-\u2064\ufeff\u180e\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
ORDER = "\u202a-\u202e\u2066-\u2069"
CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
HARMFUL = re.compile(f"{FLAG}|(?<=[!-~])[{JOINERS}]+(?=[!-~])|[{CONTROLS}{ORDER}{UNSEEN}]")
COLOUR = "\x1b\\[[0-9;]{0,40}m"
NOT_A_COLOUR = re.compile(f"{COLOUR}|{HARMFUL.pattern}")
LINE_BREAKS = {ord("\n"): "\u240a", ord("\t"): "\u2409"}


def safe(text: str) -> str:
    """The text as a terminal may get it; line breaks and tabs stay. Texts may be made safe piece by piece.

    >>> safe("a\\x1b[2Jb\\rc\\u202ed")
    'a␛[2Jb␍c\\\\u202ed'
    """
    return HARMFUL.sub(_shown, text)


def is_safe(text: str) -> bool:
    """Whether `safe` would change nothing."""
    return HARMFUL.search(text) is None


def one_line(text: str) -> str:
    """The text, safe, its line breaks shown too: for names and for parts of a line.

    >>> one_line("a\\nb")
    'a␊b'
    """
    return safe(text).translate(LINE_BREAKS)


def safe_error(text: str) -> str:
    """An error's message, safe. Lines behind its first are indented: none can pass for another message."""
    first, *rest = safe(text).split("\n")
    return "\n".join([first, *(line if line.startswith("  ") or not line else f"  {line}" for line in rest)])


def say(text: str, *, end: str = "\n", to_stderr: bool = False, flush: bool = True) -> None:
    """Print a text, safe."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(safe(text) + end)
    if flush:
        stream.flush()


def _safe_record(record: logging.LogRecord) -> None:
    change_message(record, safe)


def guard() -> None:
    """From now on this process writes to its terminal, and logs, nothing but text and colours."""
    change_records(_safe_record)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            _guard(stream)


def _guard(stream: TextIO) -> None:
    write = stream.write

    def guarded(text: str) -> int:
        return write(NOT_A_COLOUR.sub(_shown_but_colours, text))

    stream.write = guarded  # type: ignore[method-assign]


def _shown(match: re.Match[str]) -> str:
    text = match.group()
    if text[0] == "\U0001f3f4":
        return text
    return "".join(map(_escape, text))


def _shown_but_colours(match: re.Match[str]) -> str:
    text = match.group()
    return text if len(text) > 1 and text[0] == "\x1b" else _shown(match)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
