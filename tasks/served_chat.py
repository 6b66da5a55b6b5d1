"""A registered model as MLflow serves it: greedy, as it was judged, unless a request names a temperature.

In: the folder of a logged model, chat requests. Out: chat completions. This file travels with every version (`code/`)
and imports nothing of the project: MLflow's own loader samples where nothing is said, and fails at temperature 0.
"""

import copy
from types import MappingProxyType
from typing import Any

import mlflow.transformers

TEMPERATURE = "temperature"


class ChatModel:
    """MLflow's wrapper of the pipeline, once for each way to choose tokens."""

    def __init__(self, wrapper: Any) -> None:
        self.greedy, self.sampling = copy.copy(wrapper), copy.copy(wrapper)
        for one, do_sample in ((self.greedy, False), (self.sampling, True)):
            one.model_config = MappingProxyType({**wrapper.model_config, "do_sample": do_sample})

    def get_raw_model(self) -> Any:
        """The pipeline."""
        return self.greedy.get_raw_model()

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """Answer. `data`: a data frame of requests, of which the first one's options hold for all, or one request."""
        if TEMPERATURE not in data:
            return self.greedy.predict(data, params)
        temperature = data[TEMPERATURE] if isinstance(data, dict) else data[TEMPERATURE].iloc[0]
        if temperature is not None and temperature > 0:  # a data frame's missing value is NaN
            return self.sampling.predict(data, params)
        rest = (
            {key: value for key, value in data.items() if key != TEMPERATURE}
            if isinstance(data, dict)
            else data.drop(columns=[TEMPERATURE])
        )
        return self.greedy.predict(rest, params)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ChatModel:
    """What MLflow calls."""
    return ChatModel(mlflow.transformers._load_pyfunc(path, model_config))
