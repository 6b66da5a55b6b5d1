"""A registered model as MLflow serves it: greedy, as it was judged, unless a request names a temperature; it sees the
request's tools, and calls of tools as training had them.

In: the folder of a logged model, chat requests. Out: chat completions. This file travels with every version (`code/`)
and imports nothing of the project: MLflow's own loader samples where nothing is said, fails at temperature 0, leaves
`tools` out of the prompt, and hands the arguments of calls to the chat template as the JSON text that they come in.
"""

import copy
import json
from collections.abc import Mapping
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import mlflow.transformers

TEMPERATURE, TOOLS = "temperature", "tools"
Message = Mapping[str, Any]


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
        temperature, tools = _option(data, TEMPERATURE), _option(data, TOOLS)
        sampled = temperature is not None and temperature > 0  # a data frame's missing value is NaN
        one = copy.copy(self.sampling if sampled else self.greedy)
        one.pipeline = copy.copy(one.pipeline)
        one.pipeline.tokenizer = _telling(one.pipeline.tokenizer, tools if isinstance(tools, list) else None)
        return one.predict(_without(data, {TOOLS} if sampled else {TOOLS, TEMPERATURE}), params)


def _option(data: Any, name: str) -> Any:
    if name not in data:
        return None
    return data[name] if isinstance(data, dict) else data[name].iloc[0]


def _without(data: Any, names: set[str]) -> Any:
    if isinstance(data, dict):
        return {key: value for key, value in data.items() if key not in names}
    return data.drop(columns=[name for name in data if name in names])


def _telling(tokenizer: Any, tools: list[Any] | None) -> Any:
    """A copy of the tokenizer whose prompts tell of these tools."""
    told = copy.copy(tokenizer)
    told.apply_chat_template = partial(_prompt, tokenizer, tools)
    return told


def _prompt(tokenizer: Any, tools: list[Any] | None, messages: list[Message], **options: Any) -> str:
    """The prompt in the first form in which the template shows what was asked, tried in training's order."""
    made, refused = list[str](), list[Exception]()
    for form in product((False, True), repeat=3):
        try:
            text = tokenizer.apply_chat_template([_in(message, *form) for message in messages], tools=tools, **options)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            refused.append(error)
            continue
        if _shows(text, messages):
            return str(text)
        made.append(text)
    if not made:
        raise refused[0]
    return made[0]


def _in(message: Message, parts: bool, no_content: bool, arguments_as_text: bool) -> Message:
    """The message as some templates want it: its content as a list of parts, none beside calls, and their arguments as
    text; else as nearly all do."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    changed: dict[str, Any] = {"content": [{"type": "text", "text": content}] if parts else content}
    if calls and not content and no_content:
        changed["content"] = None
    if calls:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call, arguments_as_text)}}
            for call in calls
        ]
    return {**message, **changed}


def _arguments(call: Mapping[str, Any], as_text: bool = False) -> Any:
    given = call["function"]["arguments"]
    try:
        value = json.loads(given)
    except (TypeError, ValueError):
        return given
    return json.dumps(value, ensure_ascii=False) if as_text else value  # spaced as in training


def _shows(text: str, messages: list[Message]) -> bool:
    """Whether what users say is there, and no call's arguments as Python writes them."""
    asked = [message.get("content") or "" for message in messages if message["role"] == "user"]
    given = [_arguments(call) for message in messages for call in message.get("tool_calls") or ()]
    as_python = [repr(value) for value in given if value and isinstance(value, dict)]
    return all(words.strip() in text for words in asked) and not any(words in text for words in as_python)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ChatModel:
    """What MLflow calls."""
    return ChatModel(mlflow.transformers._load_pyfunc(path, model_config))
