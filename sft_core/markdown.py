"""Text in Markdown that stays text: names that come from rows, recipes or a registry.

In: any text. Out: Markdown (CommonMark, GitHub's tables and links) that a reader sees as that text, on one line. Runs
of white space become one space; what a terminal would obey, or nobody would see, is shown as a terminal shows it.
"""

import re

from sft_core.terminal import safe

MARKUP = re.compile(
    r"[\\`*\[\]<>&|~$]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it means nothing
    r"|:(?=//)|(?<=www)\.|(?<=\S)@(?=\S)"  # a bare address becomes a link
)


def as_text(text: str) -> str:
    """The text without any markup.

    >>> as_text("**a** | <b> [c](http://d) bits_per_byte")
    '\\\\*\\\\*a\\\\*\\\\* \\\\| \\\\<b\\\\> \\\\[c\\\\](http\\\\://d) bits_per_byte'
    """
    escaped = MARKUP.sub(r"\\\g<0>", _one_line(text))
    return re.sub(r"^[#+=-]|(?<=^\d)[.)]", r"\\\g<0>", escaped)  # a heading, a list


def as_code(text: str) -> str:
    """The text as code, in as many backticks as it needs; not for a table, whose cells end at any `|`.

    >>> as_code("a`b")
    '``a`b``'
    """
    line = _one_line(text)
    fence = fence_around(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def as_block(text: str, language: str) -> str:
    """Lines of text as a block of code, which nothing in them ends."""
    fence = fence_around(text, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def fence_around(text: str, least: int) -> str:
    """Backticks, `least` or one more than stand together in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def _one_line(text: str) -> str:
    return safe(" ".join(text.split()))
