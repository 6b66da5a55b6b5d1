"""Shards in this process, a few at a time.

In: the work on one shard, and its arguments. Out: the results in order. While one thread tokenises (Rust, all cores,
without Python's lock) or writes Parquet, another renders or labels; a few results at most wait to be taken.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sft_core.shards import Made

THREADS = 2


def map_overlapped(work: Callable[[Any], Made], arguments: Sequence[Any]) -> Iterator[Made]:
    """As `map`. The first error in the order of `arguments` is raised, and what has not begun is dropped."""
    gc.freeze()  # torch and transformers hold half a million objects: not to be looked through at each collection
    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[Future[Made]] = deque()
        try:
            for argument in arguments:
                waiting.append(threads.submit(work, argument))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            gc.unfreeze()
