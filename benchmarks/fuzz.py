"""Does hostile input end in one line? Run by hand: `python benchmarks/fuzz.py [--seconds N] [--kind KIND] [--seed N]`.

In: made inputs, by kind: `recipes` (YAML texts), `rows` (JSON of any shape, through fetch's formats and every shipped
map_fn), `manifests` (those of the store, and leases), `checkpoints` (real small ones with bytes changed). Out: inputs
by kind, and each that ended in something else than a result or an `SftError` of one line within LIMIT_SECONDS; exit
status 1 if there is any.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 20
"""Of one input; a thousandth of it is usual."""
SHOWN_CHARACTERS = 300
MOST_MESSAGE = 20_000
"""Characters of an error."""


class Hang(BaseException):
    """An input took longer than LIMIT_SECONDS."""


def main() -> None:
    """Fuzz, and print the table."""
    from fuzz_inputs import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for all kinds together")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    found: Counter[str] = Counter()
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="sft-fuzz-") as folder:
            tried, faults = fuzz(KINDS[kind](Path(folder)), options.seconds / len(kinds), options.seed)
        print(f"{kind}: {tried} inputs, {sum(faults.values())} that did not end in a result or one line")
        for fault, count in faults.most_common():
            print(f"  {count} times: {fault}")
        found.update(faults)
    sys.exit(1 if found else 0)


def fuzz(attack: Callable[[random.Random], object], seconds: float, seed: int) -> tuple[int, Counter[str]]:
    """Attack for so long. How many inputs, and what they ended in that was no result and no error of one line."""
    signal.signal(signal.SIGALRM, _hang)
    draw, faults, tried = random.Random(seed), Counter[str](), 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        tried += 1
        fault = end_of(attack, draw)
        if fault:
            faults[fault] += 1
    return tried, faults


def end_of(attack: Callable[[random.Random], object], draw: random.Random) -> str | None:
    """What was wrong with the end of one input; None if nothing was."""
    from sft_core.errors import SftError

    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        attack(draw)
    except SftError as error:
        words = str(error)
        if len(words) > MOST_MESSAGE:
            return f"{type(error).__name__} of {len(words)} characters: {words[:SHOWN_CHARACTERS]!r}"
        if any(line and not line.startswith("  ") for line in words.split("\n")[1:]):
            return f"{type(error).__name__} of several lines: {words[:SHOWN_CHARACTERS]!r}"
    except Hang:
        return f"over {LIMIT_SECONDS} s: {_where(sys.exc_info()[2])}"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]!r} {_where(error.__traceback__)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _where(trace: object) -> str:
    """The last line of ours."""
    ours = [frame for frame in traceback.extract_tb(trace) if "sft_core" in frame.filename]  # type: ignore[arg-type]
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside of sft_core"


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
