"""A panic of a library written in Rust (tokenizers, safetensors) is an error of one line, as any other.

pyo3's PanicException is no `Exception`, so it passes every handler; its class cannot be imported, so no other process
can be told of it. It is made a ModelError where the work on a model's files begins: a step, a shard's work, a command.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sft_core.errors import ModelError

PANIC = "PanicException"


@contextmanager
def panics_told(what: str) -> Iterator[None]:
    """ModelError in place of a panic. `what`: whose files were at work, for the message."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception; all else is raised again
        if type(error).__name__ != PANIC:
            raise
        why = str(error).partition("\n")[0]
        raise ModelError(
            f"{what}: the tokenizer's library failed on its files ({why}); tokenizer.json is damaged, or of another "
            "version of tokenizers. Fetch the model again, or take another one"
        ) from None
