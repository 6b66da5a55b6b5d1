"""Which tensors a model's files hold: names, dtypes and shapes from their headers, no numbers.

In: a model folder. Out: name -> `Weight`. Every file that the index names must be there and hold what the index says.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sft_core.convert.writer import CODES
from sft_core.errors import ModelError
from sft_core.merge.shards import Place, base_shards


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor. `file`: name of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def require_unquantized(self, model: str, name: str) -> None:
        """ModelError for 8-bit floats, which are quantised weights even where config.json does not say so."""
        if self.dtype.is_floating_point and self.dtype.itemsize < 2:
            raise ModelError(
                f"base model {model}: {name} in {self.file} is stored as {CODES.get(self.dtype, self.dtype)}: "
                "quantised on disk; take the 16-bit model that it was made of"
            )


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a local file."""

    place: Place

    @property
    def header(self) -> Header:
        """What its file says of it."""
        return Header(self.place.file.name, self.place.dtype, self.place.shape)


def weights_in(folder: Path) -> dict[str, Weight]:
    """All tensors of a folder. ModelError if a file is missing, torn, or not as the index says."""
    return {name: Weight(place) for found in base_shards(folder).values() for name, place in found.items()}
