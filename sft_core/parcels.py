"""Arguments of shard work that travel to another machine with the files they name.

In: frozen dataclasses with fields of type `Path`. Out: a `Parcel`, picklable; unpacked, the same dataclasses with paths
of a temporary folder. A file or folder named by several arguments travels once.
"""

import io
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Parcel:
    """Arguments, and a tar of what each path in them names, by that path."""

    arguments: tuple[Any, ...]
    contents: dict[str, bytes]


def pack_parcel(arguments: Sequence[Any]) -> Parcel:
    """Read every file and folder that the arguments name."""
    paths = {path for argument in arguments for path in _paths(argument).values()}
    return Parcel(tuple(arguments), {str(path): _tar(path) for path in sorted(paths)})


@contextmanager
def unpacked(parcel: Parcel) -> Iterator[list[Any]]:
    """The arguments with paths of this machine, as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="sft-parcel-") as folder:
        here: dict[str, Path] = {}
        for number, (name, content) in enumerate(parcel.contents.items()):
            target = Path(folder) / str(number)
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                tar.extractall(target, filter="data")
            here[name] = target / Path(name).name
        yield [
            replace(argument, **{field: here[str(path)] for field, path in _paths(argument).items()})
            for argument in parcel.arguments
        ]


def _paths(argument: Any) -> dict[str, Path]:
    """Fields that hold a path."""
    values = {field.name: getattr(argument, field.name) for field in fields(argument)}
    return {name: value for name, value in values.items() if isinstance(value, Path)}


def _tar(path: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(path, arcname=path.name)
    return buffer.getvalue()
