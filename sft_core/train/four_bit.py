"""Layers in 4 bits, known without bitsandbytes: its import takes two seconds, and most of them for torch's compiler.

A model has such layers only where bitsandbytes was imported to make them.
"""

import sys
from typing import Any


def is_4bit(module: Any) -> bool:
    """Whether this is bitsandbytes' `Linear4bit`."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)
