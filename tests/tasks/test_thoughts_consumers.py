"""Consumers of a model that thinks, and of one that calls tools: the network reads the ids that were trained."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from transformers import AutoTokenizer

from sft_core.chat import ChatModel, load_chat_model
from sft_core.pack import encode_conversation
from sft_core.steps import Retraining
from tasks.model_files import ModelFolder, log_folder
from tests.flows.thoughts_and_tools import (
    IM_END,
    THINKING_TWICE,
    WEATHER,
    Messages,
    answer,
    calling,
    learned,
    runs,
    trained_turns,
    user,
)
from tests.tasks.models_project import connected
from tests.tasks.test_models_consumers import record

__all__ = ["learned", "runs"]
pytestmark = pytest.mark.slow
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
SHOWN_TOOLS = {"role": "system", "content": f"Tools:\n{json.dumps(WEATHER['function'])}"}
"""As the template writes the tools: for interfaces that take none."""
THOUGHT_INSIDE = [user("Is 33 a number?"), answer("<think>\nIt is a number.\n</think>\n\nYes."), user("Is it even?")]
"""As a client gets and returns the answer."""
PICKY = r"""
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\n" -}}
  {%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
  {%- for call in message.tool_calls or [] -%}
    {{- "<tool_call>" ~ call.function.name ~ " " ~ call.function.arguments ~ "</tool_call>" -}}
  {%- endfor -%}
  {{- "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
"""
"""A template that reads contents as parts only, as those of models that see do, and arguments as text only."""


@pytest.fixture(scope="module")
def client(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    folder = tmp_path_factory.mktemp("registry")
    for client in connected(shutil.copyfile(empty_database, folder / "mlflow.db")):
        client.create_experiment("served", artifact_location=(folder / "artifacts").as_uri())
        yield client


def log(client: MlflowClient, folder: Path, name: str) -> str:
    """URI of the folder as a logged model."""
    run = client.create_run(client.get_experiment_by_name("served").experiment_id)
    return log_folder(ModelFolder(folder, name, name, 60), run.info.run_id)


def seen_by(model: ChatModel, messages: Messages, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids that a talk's network reads."""
    seen = record(model.network, monkeypatch)
    list(model.answer(messages, max_new_tokens=2, temperature=0.0))
    return seen[-1]


def test_a_thought_in_the_talk_is_read_as_in_training(
    learned: Callable[[str], Retraining], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = learned("thinking")
    _, (trained, _) = trained_turns(run, "Is 33 a number?")
    model = load_chat_model(run.folder("merge"), None, None)
    for talk in (THINKING_TWICE[:3], THOUGHT_INSIDE):
        assert seen_by(model, talk, monkeypatch) == trained
    served = mlflow.pyfunc.load_model(log(client, run.folder("merge"), "thinking"))
    seen = record(served.get_raw_model().model, monkeypatch)
    (reply,) = served.predict({"messages": THOUGHT_INSIDE})
    assert seen == [trained]
    assert reply["choices"][0]["message"]["content"] == "<think>\n33 is odd.\n</think>\n\nNo."
    pipeline = mlflow.transformers.load_model(log(client, run.folder("merge"), "thinking"))
    seen = record(pipeline.model, monkeypatch)
    pipeline(THINKING_TWICE[:3], max_new_tokens=2, do_sample=False)
    assert seen == [trained]


def test_tools_and_calls_are_read_as_in_training(
    learned: Callable[[str], Retraining], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = learned("tools")
    (first, _), (second, _) = trained_turns(run, "Weather in Rome, day 17?")
    source = log(client, run.folder("merge"), "tools")
    served = mlflow.pyfunc.load_model(source)
    seen = record(served.get_raw_model().model, monkeypatch)
    talk = calling(17, arguments_as_text=True)
    replies = [served.predict({"messages": talk[:upto], "tools": [WEATHER]})[0] for upto in (1, 3)]
    assert seen == [first, second]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == [CALL, "It is sunny."]
    pipeline = mlflow.transformers.load_model(source)
    seen = record(pipeline.model, monkeypatch)
    for upto in (1, 3):
        pipeline(calling(17)[:upto], tools=[WEATHER], max_new_tokens=2, do_sample=False)
    assert seen == [first, second]


def test_a_request_without_tools_shows_none_after_one_with_them(
    learned: Callable[[str], Retraining], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = learned("tools")
    ((trained, _),) = trained_turns(run, "Hi.")
    served = mlflow.pyfunc.load_model(log(client, run.folder("merge"), "tools"))
    seen = record(served.get_raw_model().model, monkeypatch)
    for options in ({"tools": [WEATHER]}, {}, {"temperature": 0.5}):
        served.predict({"messages": [user("Hi.")], "max_tokens": 2, **options})
    assert seen[0] != trained
    assert seen[1:] == [trained, trained]


def test_chat_ends_at_a_call_with_the_merged_model_and_with_the_adapter(
    learned: Callable[[str], Retraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = learned("tools")
    (trained, _), _ = trained_turns(run, "Weather in Rome, day 17?")
    asked = [SHOWN_TOOLS, user("Weather in Rome, day 17?")]
    base = run.base_model()
    assert json.loads((base / "config.json").read_text())["eos_token_id"] == IM_END  # the base knows of no calls
    for model in (
        load_chat_model(run.folder("merge"), None, None),
        load_chat_model(base, run.folder("convert"), None),
    ):
        assert seen_by(model, asked, monkeypatch) == trained
        assert "".join(model.answer(asked, max_new_tokens=60, temperature=0.0)) == CALL


def test_messages_are_given_in_the_form_that_training_found(
    tiny_model: Path, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "picky")
    (folder / "chat_template.jinja").write_text(PICKY.removeprefix("\n"))
    (sequence,) = encode_conversation(calling(17), AutoTokenizer.from_pretrained(folder), PICKY.removeprefix("\n"))
    before = AutoTokenizer.from_pretrained(folder).decode(sequence.input_ids)
    told = '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>\n<|im_start|>tool\nSun.<|im_end|>'
    assert f"Weather in Rome, day 17?<|im_end|>\n<|im_start|>assistant\n{told}" in before
    served = mlflow.pyfunc.load_model(log(client, folder, "picky"))
    seen = record(served.get_raw_model().model, monkeypatch)
    for upto in (1, 3):
        served.predict({"messages": calling(17, arguments_as_text=True)[:upto], "max_tokens": 2})
    assert seen == [sequence.input_ids[: len(ids)] for ids in seen]
    assert [sequence.labels[len(ids) - 1 : len(ids) + 1] for ids in seen] == [
        [-100, token_of("<", folder)],
        [-100, token_of("I", folder)],
    ]
    assert seen_by(load_chat_model(folder, None, None), calling(17)[:1], monkeypatch) == seen[0]


def token_of(letter: str, folder: Path) -> int:
    return int(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(letter))
