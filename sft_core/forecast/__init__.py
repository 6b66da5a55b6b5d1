"""Forecast: what a training will take of a GPU, before anything is loaded.

In: a model's configuration, the recipe's `train` section. Out: bytes by what they hold, tokens a second, and the
quickest way to split an optimizer step's rows that fits. Counted on the model's own code with tensors that have no
numbers, so neither weights nor a GPU are needed.
"""

from sft_core.forecast.forecaster import Forecast, Forecaster, NotCountedError, Split, Trains, size
from sft_core.forecast.gpus import CPU, GPUS, Gpu, gpu_at_hand, read_gpu

__all__ = [
    "CPU",
    "GPUS",
    "Forecast",
    "Forecaster",
    "Gpu",
    "NotCountedError",
    "Split",
    "Trains",
    "gpu_at_hand",
    "read_gpu",
    "size",
]
