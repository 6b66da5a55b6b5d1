"""What one input may cost. Compressed, nested, repeated or endless, a small file must not take a machine.

In: nothing. Out: numbers, each with its reason. A row over one is set aside with the reason `too_large` (`not_json`
where it is nested too deeply), a file, recipe or template over one is a single error that says which.
"""

from collections.abc import Sequence

MOST_ROW_BYTES = 16 << 20
"""Of a row, as it is read and as JSON text. A million tokens are 4 to 6 MB; a row in Python takes up to 30 times its
bytes, so this is half a gigabyte at worst."""
KEPT_CHARACTERS = 4096
"""How much of a row over MOST_ROW_BYTES is kept in the quarantine."""
MOST_DEPTH = 100
"""Lists and objects inside one another, in rows and recipes. Schemas of tools nest about 20 deep; Python's own readers
and writers give up near 1000, each at a depth of its own."""
FREE_BYTES = 256 << 20
"""What a file may expand to whatever its size. A line costs a third of a microsecond, and blank ones are lines too:
this many take a minute."""
MOST_EXPANSION = 200
"""How many times its size a larger one may expand. Rows compress 3 to 20 times, very uniform ones 50; a bomb of gzip
1000 times, of bzip2 or a Parquet dictionary a million."""
BATCH_BYTES = FREE_BYTES
"""What is decoded at a time of a table."""
DICTIONARY_BYTES = 128 << 20
"""Memory that an .xz file may ask for; `xz -9` asks for 65 MB."""
YAML_CHARACTERS = 1_000_000
"""Of a recipe's text; the longest that ships has 5,000."""
YAML_NODES = 100_000
"""Keys and values of a recipe, what an alias repeats counted each time."""
RENDER_SECONDS = 20.0
"""CPU time of one rendering of a conversation; usual ones take milliseconds, a row of MOST_ROW_BYTES one second."""
RENDER_CHARACTERS = 4 * MOST_ROW_BYTES
"""Of a rendering, and of any text that a template makes on the way."""


def allowed(size: int) -> int:
    """Bytes that `size` bytes may expand to.

    >>> allowed(1_000), allowed(10_000_000)
    (268435456, 2000000000)
    """
    return max(FREE_BYTES, MOST_EXPANSION * size)


def nests_too_deeply(value: object, most: int = MOST_DEPTH) -> bool:
    """Whether lists and dicts are inside one another more than `most` times.

    >>> nests_too_deeply({"a": [1]}, 2), nests_too_deeply({"a": [1]}, 1)
    (False, True)
    """
    level: Sequence[object] = [value]
    for _ in range(most):
        inner = [part for held in level for part in _parts(held) if isinstance(part, dict | list)]
        if not inner:
            return False
        level = inner
    return isinstance(value, dict | list)


def _parts(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
