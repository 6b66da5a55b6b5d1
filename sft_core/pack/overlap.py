"""Shards in this process, one a thread.

In: the work on one shard, and its arguments. Out: the results in order. A shard is tokenised (Rust, without Python's
lock) on its thread's core while others render, label or write Parquet; a few results at most wait to be taken. The
tokenizer's own threads, which share a batch out over all cores and wait for its last text, run only at the end, when
fewer shards are left than cores.
"""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sft_core.shards import Made

MOST_THREADS = 5
"""Python's lock is held for a fifth of a shard's work."""
PARALLELISM = "TOKENIZERS_PARALLELISM"
"""Read by tokenizers at each batch; no other way to tell it."""


def map_overlapped(work: Callable[[Any], Made], arguments: Sequence[Any]) -> Iterator[Made]:
    """As `map`. The first error in the order of `arguments` is raised, and what has not begun is dropped."""
    number = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    gc.freeze()  # torch and transformers hold half a million objects: not to be looked through at each collection
    with _tokenizers_parallelism() as set_parallelism, ThreadPoolExecutor(number) as threads:
        waiting: deque[Future[Made]] = deque()
        try:
            for argument in arguments:
                waiting.append(threads.submit(work, argument))
                if len(waiting) > number:
                    yield waiting.popleft().result()
            while waiting:
                set_parallelism(len(waiting) < number)
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            gc.unfreeze()


@contextmanager
def _tokenizers_parallelism() -> Iterator[Callable[[bool], None]]:
    """Off, and a function that switches it; afterwards as it was."""

    def switch(on: bool) -> None:
        os.environ[PARALLELISM] = "true" if on else "false"

    before = os.environ.get(PARALLELISM)
    switch(False)
    try:
        yield switch
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
