"""Task of the step fetch: source -> RawDataset."""

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from prefect import task

from tasks.run_step import STEP, Job, perform


def source_name(source: str) -> str:
    """The last part of a path, glob, hub id or URL; never a URL's credentials or query.

    >>> [source_name(s) for s in ("data/rows-?.jsonl", "timdettmers/guanaco", "https://me:key@host/a.jsonl?sig=1")]
    ['rows-?.jsonl', 'guanaco', 'a.jsonl']
    """
    if "://" not in source:
        return PurePosixPath(source).name
    url = urlsplit(source)
    return PurePosixPath(url.path).name or url.hostname or url.scheme


def _run_name(parameters: dict[str, Any]) -> str:
    return f"fetch {source_name(parameters['source'])}"


@task(name="fetch", task_run_name=_run_name, **STEP)  # type: ignore[arg-type]  # its protocol asks for a class
def fetch(job: Job, index: int, source: str) -> Any:
    """Copy the rows of one source, unchanged, into the store. `index` counts datasets, then eval_datasets."""
    return perform(job, f"fetch/{index}")
