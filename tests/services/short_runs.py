"""Many short flow runs, one after the other: `python -m tests.services.short_runs FIRST COUNT`.

In: PREFECT_API_URL. Out: flow runs `short-FIRST`, `short-FIRST+1`, ..., two task runs each. A process of its own, not
one of a pool: the last states of task runs are sent when the interpreter ends, which a pool's process does not do.
"""

import sys

from prefect import flow, task


@task
def twice(number: int) -> int:
    """Work that takes no time."""
    return 2 * number


@flow(name="short", flow_run_name="short-{number}")
def short(number: int) -> int:
    """Two tasks, one after the other."""
    return twice(twice(number))


def main() -> None:
    """Run them; an error of any of them ends this with its traceback."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    for number in range(first, first + count):
        assert short(number) == 4 * number


if __name__ == "__main__":
    main()
