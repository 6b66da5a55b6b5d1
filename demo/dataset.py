"""The demo's instruction data: requests to an order desk and the desk's answers.

In: a seed and a number of rows. Out: a JSONL file with one column, ``text``, in the layout of the
guanaco cut of oasst1: ``### Human: <request>### Assistant: <answer>``, a few rows with two such turns.

Every row names an order that no other row names, so a right answer to a held-out request can only come
from reading the request: the kind of reply follows from the wording, the order number has to be copied
out of it. A second turn says "it", so there the number comes from the turn before.

    python -m demo.dataset demo/data/orders.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

ROWS = 600
TWO_TURN_SHARE = 0.25
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"


@dataclass(frozen=True)
class Kind:
    """One kind of request: its phrasings, its one answer, and how to ask it of "it" in a second turn."""

    requests: tuple[str, ...]
    answer: str
    follow_up: str


KINDS = (
    Kind(
        ("Where is order {id}?", "Can you tell me where {id} is?", "Has my order {id} left yet?"),
        "Order {id} is on its way.",
        "Where is it now?",
    ),
    Kind(
        ("Please cancel order {id}.", "I no longer want order {id}.", "Stop order {id}, please."),
        "Order {id} is cancelled.",
        "Please cancel it.",
    ),
    Kind(
        ("I want my money back for {id}.", "Please refund order {id}.", "Can I get a refund for {id}?"),
        "We have refunded order {id}.",
        "Please refund it.",
    ),
    Kind(
        ("Order {id} arrived broken.", "The goods in {id} are damaged.", "My parcel {id} came in pieces."),
        "Sorry! We will replace order {id}.",
        "It arrived broken.",
    ),
    Kind(
        ("Send me the invoice for {id}.", "I need a bill for order {id}.", "Can I have a receipt for {id}?"),
        "The invoice for {id} is in your inbox.",
        "Send me the invoice for it.",
    ),
    Kind(
        ("How heavy is order {id}?", "What does {id} weigh?", "Is {id} too heavy for me?"),
        "Order {id} weighs two pounds.",
        "How heavy is it?",
    ),
)


def order_number(rng: random.Random) -> str:
    """Two letters and four digits, none of them twice: the desk's numbers never repeat a character."""
    return "".join(rng.sample(LETTERS, 2)) + "".join(rng.sample(DIGITS, 4))


def turn(request: str, answer: str, number: str) -> str:
    return f"### Human: {request.format(id=number)}### Assistant: {answer.format(id=number)}"


def make_row(rng: random.Random, number: str) -> str:
    """The text of one row about the order ``number``."""
    first, second = rng.sample(KINDS, 2)
    text = turn(rng.choice(first.requests), first.answer, number)
    if rng.random() < TWO_TURN_SHARE:
        text += turn(second.follow_up, second.answer, number)
    return text


def make_rows(rows: int = ROWS, seed: int = 0) -> list[str]:
    """The texts of ``rows`` rows, each about an order of its own."""
    rng = random.Random(seed)
    numbers: dict[str, None] = {}
    while len(numbers) < rows:
        numbers[order_number(rng)] = None
    return [make_row(rng, number) for number in numbers]


def write_dataset(out: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Write the data set to ``out``; the same arguments give the same bytes."""
    lines = [json.dumps({"text": text}) + "\n" for text in make_rows(rows, seed)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes("".join(lines).encode("ascii"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.dataset", description="Write the demo's data set.")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_dataset(args.out, args.rows, args.seed)


if __name__ == "__main__":
    main()
