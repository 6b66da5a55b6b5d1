"""Some rows of a model's input and output embeddings, read from its safetensors files without loading the model.

In: a Hugging Face model folder. Out: `TokenMatrix`: which module it is, how many rows it has, rows as float32. Only the
rows asked for are read. Needs no torch. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import ModelError

INPUT_MODULES = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "embed_in", "embedding")
OUTPUT_MODULES = ("lm_head", "output", "embed_out", "output_layer")
"""Last part of the module's name in Llama, Qwen, Mistral, Gemma and most others; InternLM2; GPT-NeoX; ChatGLM."""
ELEMENTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy has no bfloat16: its bits are the upper half of a float32."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
Rows = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TokenMatrix:
    """A weight with a row a token id: (rows, width), at `offset` bytes in `file`."""

    module: str
    file: Path
    offset: int
    element: str
    rows: int
    width: int

    def read(self, ids: Sequence[int]) -> Rows:
        """Rows of these ids: (len(ids), width)."""
        shape = (self.rows, self.width)
        kind = np.dtype(ELEMENTS[self.element])
        try:
            chosen = np.asarray(np.memmap(self.file, kind, "r", self.offset, shape)[np.asarray(ids, np.int64)])
        except ValueError as error:  # the file ends before the matrix does
            raise ModelError(f"{self.file}: torn, {self.module} is not whole; fetch the base model again") from error
        if self.element == "BF16":
            chosen = (chosen.astype(np.uint32) << 16).view(np.float32)
        return chosen.astype(np.float32)


def input_matrix(folder: Path) -> TokenMatrix | None:
    """The token embeddings; None where no tensor is plainly that (another name, another format)."""
    return _find(folder, INPUT_MODULES)


def output_matrix(folder: Path) -> TokenMatrix | None:
    """The output head, which is the token embeddings where they are tied; None as above."""
    head = _find(folder, OUTPUT_MODULES)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True))
    return head if head is not None or not tied else input_matrix(folder)


def has_biased_head(folder: Path) -> bool:
    """Whether the output head adds a bias, as Phi's does."""
    names = {f"{module}.bias" for module in OUTPUT_MODULES}
    return any(".".join(name.split(".")[-2:]) in names for _, header in _headers(folder) for name in header)


def _find(folder: Path, modules: Sequence[str]) -> TokenMatrix | None:
    found = [
        (file, module, entry)
        for file, header in _headers(folder)
        for name, entry in header.items()
        if (module := name.removesuffix(".weight").rpartition(".")[2]) in modules and name.endswith(".weight")
    ]
    if len(found) != 1:
        return None
    file, module, entry = found[0]
    if entry["dtype"] not in ELEMENTS or len(entry["shape"]) != 2:
        return None
    return TokenMatrix(module, file, entry["at"] + entry["data_offsets"][0], entry["dtype"], *entry["shape"])


def _headers(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each file with its tensors; `at` is where its data begin."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    headers = []
    for file in (folder / name for name in names):
        if not file.is_file():
            return []
        try:
            with file.open("rb") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(min(size, MAX_HEADER_BYTES)))
        except (struct.error, ValueError) as error:
            raise ModelError(f"{file}: not a safetensors file; fetch the base model again") from error
        header.pop("__metadata__", None)
        headers.append((file, {name: {**entry, "at": 8 + size} for name, entry in header.items()}))
    return headers
