"""Tokens of the chat template that the base model never learned.

In: the base model's folder, its vocabulary, the ids that the packed rows really use. Out: `UntrainedToken`s. A LoRA
adapter leaves the embeddings and the output head alone, so a token whose output row was never trained stays unlikely
whatever is learned around it: chatml's `<|im_end|>` on a base model, and answers never end.

How an untrained row is known (after Land & Bartolo 2024, "Fishing for Magikarp", arXiv 2405.05417), each a sign:

- small: its norm is below a third of the vocabulary's median (reserved rows that were begun or decayed to nothing)
- equal: it equals the row of another special token, of an id that no text can hold, or the mean of the vocabulary (how
  transformers begins added rows): what was trained on different texts is not equal
- alike: it lies among the rows of ids that no text can hold, in direction and length: they moved together, if at all
- as begun: it has the norm of those rows, or of the configuration's `initializer_range`, and is as far from all others
  as random rows are

A sign counts only where at most RARE of the ordinary vocabulary shows it too: where all rows look alike, as in a random
model, nothing can be told, and nothing is said.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_core.outlook.weight_rows import Rows, TokenMatrix, input_matrix, output_matrix

SAMPLE = 2000
"""Rows of the ordinary vocabulary that are compared with."""
FEWEST = 100
"""Ordinary tokens in a vocabulary of which anything can be told."""
MOST_UNUSED = 200
RARE = 0.02
SMALL = 1 / 3
EQUAL_COSINE, EQUAL_NORM = 0.999, 0.02
CLUSTER = 4
"""Ids that no text can hold, for a comparison with them as a group."""
UNUSED = re.compile(r"reserved|unused|extra_id|placeholder|dummy|special_\d+", re.IGNORECASE)
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Marked = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class UntrainedToken:
    """A token whose row was never trained. `norm` is the row's length, `typical` the vocabulary's median."""

    token: str
    token_id: int
    module: str
    is_output: bool
    norm: float
    typical: float
    sign: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens by id: all of them, and those that were added to its model, special ones first of all."""

    tokens: dict[int, str]
    added: dict[int, str]


@dataclass(frozen=True, slots=True)
class UsedTokens:
    """Ids of special tokens in the packed rows: all that are read, and those that are trained to be written."""

    read: frozenset[int]
    written: frozenset[int]


def untrained_tokens(base: Path, vocabulary: Vocabulary, used: UsedTokens) -> list[UntrainedToken]:
    """Written tokens with an untrained output row, then read ones with an untrained input row."""
    output, inputs = output_matrix(base), input_matrix(base)
    found = [] if output is None else _find(base, output, vocabulary, used.written, is_output=True)
    if inputs is not None and inputs != output:
        found += _find(base, inputs, vocabulary, used.read, is_output=False)
    return found


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a row is compared with, of one matrix. `special`: rows of all added tokens, `special_ids` whose they are."""

    ordinary: Rows
    special: Rows
    special_ids: tuple[int, ...]
    unused: Rows
    initial_norm: float | None


def _find(
    base: Path, matrix: TokenMatrix, vocabulary: Vocabulary, wanted: frozenset[int], *, is_output: bool
) -> list[UntrainedToken]:
    ids = sorted(i for i in wanted if i < matrix.rows)
    tokens, added = vocabulary.tokens, vocabulary.added
    ordinary = [i for i, t in tokens.items() if i < matrix.rows and i not in added and _is_ordinary(t)]
    if not ids or len(ordinary) < FEWEST:
        return []
    unused = [i for i in range(matrix.rows) if i not in tokens][:MOST_UNUSED]
    unused += [i for i, text in added.items() if i < matrix.rows and i not in wanted and UNUSED.search(text)]
    special = tuple(i for i in sorted(added) if i < matrix.rows)
    around = _Surroundings(
        matrix.read(sorted(ordinary)[:: math.ceil(len(ordinary) / SAMPLE)]),
        matrix.read(special),
        special,
        matrix.read(unused[:MOST_UNUSED]),
        _initial_norm(base, matrix.width),
    )
    rows, typical = matrix.read(ids), float(np.median(_norms(around.ordinary)))
    signs = {name: mark for name, sign in SIGNS.items() if (mark := sign(rows, ids, around)) is not None}
    return [
        UntrainedToken(
            token=tokens.get(number, str(number)),
            token_id=number,
            module=matrix.module,
            is_output=is_output,
            norm=float(_norms(rows)[place]),
            typical=typical,
            sign=next(name for name, mark in signs.items() if mark[place]),
        )
        for place, number in enumerate(ids)
        if any(mark[place] for mark in signs.values())
    ]


def _small(rows: Rows, ids: Sequence[int], around: _Surroundings) -> Marked | None:
    limit = SMALL * float(np.median(_norms(around.ordinary)))
    return _rare(_norms(rows) < limit, _norms(around.ordinary) < limit)


def _equal(rows: Rows, ids: Sequence[int], around: _Surroundings) -> Marked | None:
    others = np.concatenate([around.special, around.unused, around.ordinary.mean(axis=0, keepdims=True)])
    owners = np.array([*around.special_ids, *[-1] * (len(others) - len(around.special_ids))])

    def marked(these: Rows, own: NDArray[np.int64]) -> Marked:
        equal = _directions(these) @ _directions(others).T >= EQUAL_COSINE  # (these, others)
        ratio = _norms(these)[:, None] / np.maximum(_norms(others)[None], 1e-12)
        equal &= np.abs(ratio - 1) <= EQUAL_NORM
        return (equal & (own[:, None] != owners[None])).any(axis=1)

    nobody = np.full(len(around.ordinary), -2)
    return _rare(marked(rows, np.array(ids)), marked(around.ordinary, nobody))


def _alike(rows: Rows, ids: Sequence[int], around: _Surroundings) -> Marked | None:
    unused = around.unused
    if len(unused) < CLUSTER:
        return None
    middle = _directions(unused.mean(axis=0, keepdims=True))[0]
    without = _directions((unused.sum(axis=0) - unused) / (len(unused) - 1))  # each row against the mean of the rest
    own = (_directions(unused) * without).sum(axis=1)
    if np.quantile(own, 0.1) < 0.5:
        return None  # they have no direction in common
    least, longest = float(np.quantile(own, 0.1)), 1.1 * float(_norms(unused).max())

    def marked(these: Rows) -> Marked:
        return (_directions(these) @ middle >= least) & (_norms(these) <= longest)

    return _rare(marked(rows), marked(around.ordinary))


def _as_begun(rows: Rows, ids: Sequence[int], around: _Surroundings) -> Marked | None:
    width, sample = around.ordinary.shape[1], len(around.ordinary)
    spread = 4 / math.sqrt(2 * width)  # four standard deviations of the norm of a random row
    if len(around.unused) >= CLUSTER:
        middle = float(np.median(_norms(around.unused)))
    elif around.initial_norm is not None:
        middle = around.initial_norm
    else:
        return None
    apart = 1.2 * math.sqrt(2 * math.log(sample) / width)  # the largest of so many cosines of random directions
    if apart >= 0.5:
        return None  # too few dimensions: random rows are not far from others
    vocabulary = _directions(around.ordinary)

    def marked(these: Rows, same: bool) -> Marked:
        near = np.abs(_directions(these) @ vocabulary.T)
        if same:
            np.fill_diagonal(near, 0)
        return (np.abs(_norms(these) / max(middle, 1e-12) - 1) <= spread) & (near.max(axis=1) <= apart)

    return _rare(marked(rows, same=False), marked(around.ordinary, same=True))


SIGNS: dict[str, Callable[[Rows, Sequence[int], _Surroundings], Marked | None]] = {
    "small": _small,
    "equal": _equal,
    "alike": _alike,
    "as begun": _as_begun,
}


def _rare(marked: Marked, ordinary: Marked) -> Marked | None:
    """A sign that the ordinary vocabulary shows too tells nothing."""
    return marked if float(ordinary.mean()) <= RARE else None


def _is_ordinary(token: str) -> bool:
    """Single bytes and characters are in a vocabulary whether any text has them or not."""
    return len(token) > 1 and not BYTE.fullmatch(token)


def _initial_norm(base: Path, width: int) -> float | None:
    config = json.loads((base / "config.json").read_text("utf-8"))
    scale = config.get("initializer_range", config.get("text_config", {}).get("initializer_range"))
    return None if scale is None else float(scale) * math.sqrt(width)


def _norms(rows: Rows) -> Rows:
    return np.linalg.norm(rows, axis=1)


def _directions(rows: Rows) -> Rows:
    return rows / np.maximum(_norms(rows)[:, None], np.float32(1e-12))
