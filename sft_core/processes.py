"""Work on shards in several processes of this machine.

In: how many. Out: a `Mapper`. Each process tokenises on its share of the cores; results come in the order of the
arguments, so the bytes are those of one process.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

from sft_core import stop
from sft_core.children import die_with_parent
from sft_core.quiet import quiet_libraries
from sft_core.shards import Made, Mapper

CORES_PER_PROCESS = 2
"""A fifth of pack's work, and nearly all of normalize's, holds Python's lock: on four cores a process would leave more
than a third of their time unused, on two a sixth."""
LEAST_CORES = 8
"""With fewer, one process packs on several threads (`pack.overlap`): nothing to start, nothing to hand over."""


def default_processes() -> int:
    """As many processes as this machine's cores keep busy."""
    cores = len(os.sched_getaffinity(0))
    return cores // CORES_PER_PROCESS if cores >= LEAST_CORES else 1


@contextmanager
def process_mapper(processes: int) -> Iterator[Mapper]:
    """`map` for one process, else a pool's. Nothing is started before there is work for all of it."""
    if processes == 1:
        yield map
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (os.getpid(), threads))

    def mapper(work: Callable[[Any], Made], arguments: Sequence[Any]) -> Iterable[Made]:
        if len(arguments) <= processes:  # done before a process has imported what it needs
            return map(work, arguments)
        with stop.kept_from_children():
            return pool.map(work, arguments)

    before = set(active_children())
    try:
        yield mapper
    except BaseException:  # also a stop: what the processes are at work on is wanted no more; raised again
        for process in set(active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, threads: int) -> None:
    """In a new process, before the tokenizer's thread pool is made."""
    die_with_parent(parent)
    quiet_libraries()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
