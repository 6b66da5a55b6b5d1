"""Read `.pth` and `.pt` files of trainers that one need not trust: nothing in the file gets executed.

In: a torch zip file. Out: its plain data (dicts, lists, numbers, texts, tensors). The unpickler is torch's own
(`weights_only=True`); the classes that XTuner and DeepSpeed put into their files besides are replaced, by name, by
inert stand-ins, so neither has to be installed. Every other class is refused.
"""

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch

from sft_core.errors import ModelError

TORN = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    struct.error,
)
"""What torch.load raises on cut or scrambled files."""


class Inert:
    """Stands in for an object that no converter needs: takes any arguments and state, keeps nothing."""

    def __init__(self, *_: object) -> None:
        """Forget the arguments."""

    def __setstate__(self, _: object) -> None:
        """Forget the state."""


STAND_INS: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": Inert,
    "mmengine.config.config.ConfigDict": dict,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": Inert,
    "numpy.dtype": Inert,
    "numpy.ndarray": Inert,
    "numpy._core.multiarray.scalar": Inert,
    "numpy._core.multiarray._reconstruct": Inert,
    "numpy.core.multiarray.scalar": Inert,
    "numpy.core.multiarray._reconstruct": Inert,
    "builtins.getattr": Inert,
}
"""Name in the file -> what is made in its place. `getattr` is met as part of a HistoryBuffer."""


def read_pickle(path: Path) -> dict[str, Any]:
    """The file's data, tensors mapped from disk. ModelError naming the class it may not hold, or the torn file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the checkpoint is incomplete, take another one")
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {_refusal(str(error))}; nothing was executed") from None
    except TORN as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: torn, or not a file of torch.save ({why}); take another checkpoint") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a {type(data).__name__} where a checkpoint holds a dict")
    return data


def _refusal(message: str) -> str:
    name = re.search(r"GLOBAL (\S+)", message)
    if name:
        return f"the pickle names {name[1]}, which no checkpoint of XTuner, DeepSpeed or the Trainer needs; refused"
    return "the pickle does more than a checkpoint of XTuner, DeepSpeed or the Trainer needs; refused"
