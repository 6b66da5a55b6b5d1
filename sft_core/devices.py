"""Where a model's weights go.

In: the machine. Out: arguments of transformers' `from_pretrained` by which weights are read straight onto the GPU, if
there is one: not the whole model into main memory first, and then over.
"""

from typing import Any


def placement() -> dict[str, Any]:
    """Empty on a CPU."""
    import torch  # slow to import

    return {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
