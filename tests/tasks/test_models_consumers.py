"""Consumers of a registered version, each as its users call it: the network reads the token ids of training."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.chat import load_chat_model
from sft_core.pack import IGNORE_INDEX, encode_messages, load_chat_template
from tasks.model_files import ModelFolder, log_folder
from tasks.tracking import download_model
from tests.tasks.models_project import connected

pytestmark = pytest.mark.slow
SERVER_SECONDS = 800
"""Bound on the start of `mlflow models serve`; most of it is imports."""
BOS, EOS = "<|im_start|>", "<|im_end|>"
BOS_ID = 1
URI = "models:/served@champion"
QUESTION = [{"role": "user", "content": "say w1"}]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model folder whose tokenizer adds a BOS and whose chat template writes one: the worst case."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    shutil.copytree(tiny_model, folder)
    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    rules.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": BOS}))
    (folder / "chat_template.jinja").write_text(load_chat_template("llama2_chat"))
    return folder


@pytest.fixture(scope="module")
def client(merged: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    """A registry with that model as champion."""
    folder = tmp_path_factory.mktemp("registry")
    for client in connected(shutil.copyfile(empty_database, folder / "mlflow.db")):
        experiment = client.create_experiment("served", artifact_location=(folder / "artifacts").as_uri())
        run = client.create_run(experiment)
        source = log_folder(ModelFolder(merged, "f" * 64, "served", 5), run.info.run_id)
        version = mlflow.register_model(source, "served")
        client.set_registered_model_alias("served", "champion", version.version)
        yield client


@pytest.fixture(scope="module")
def trained_ids(merged: Path) -> list[int]:
    """The ids before the answer, as pack writes them for training."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [*QUESTION, {"role": "assistant", "content": "w1", "weight": 1}]
    sequence = encode_messages(messages, tokenizer, load_chat_template("llama2_chat"))
    return list(sequence.input_ids[: next(i for i, label in enumerate(sequence.labels) if label != IGNORE_INDEX)])


def record(network: Any, monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]] | None = None) -> list[list[int]]:
    """Prompts that reach the network, id by id; `told`: with which options."""
    seen: list[list[int]] = []
    generate = network.generate

    def recording(*arguments: Any, **options: Any) -> Any:
        if told is not None:
            told.append(options)
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        seen.append(ids[0].tolist())
        return generate(*arguments, **options)

    monkeypatch.setattr(network, "generate", recording)
    return seen


def test_the_fixture_is_the_worst_case(merged: Path, trained_ids: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text).input_ids[:3].count(BOS_ID) == 2  # rendered, then tokenised again
    assert trained_ids.count(BOS_ID) == 1


def test_transformers_flavor(client: MlflowClient, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = mlflow.transformers.load_model(URI)
    seen = record(pipeline.model, monkeypatch)
    pipeline(QUESTION, max_new_tokens=2)
    assert seen == [trained_ids]


def test_pyfunc(client: MlflowClient, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = mlflow.pyfunc.load_model(URI)
    seen = record(loaded.get_raw_model().model, monkeypatch)
    (answer,) = loaded.predict({"messages": QUESTION, "max_tokens": 3})
    assert seen == [trained_ids]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["model"] == "served"
    assert loaded.metadata.signature is not None
    assert loaded.input_example["messages"]


def test_answers_are_greedy_as_judged_unless_a_temperature_is_named(
    client: MlflowClient, merged: Path, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, told = mlflow.pyfunc.load_model(URI), list[dict[str, Any]]()
    network = AutoModelForCausalLM.from_pretrained(merged)
    greedy = network.generate(torch.tensor([trained_ids]), max_new_tokens=5, do_sample=False)[0, len(trained_ids) :]
    expected = AutoTokenizer.from_pretrained(merged).decode(greedy, skip_special_tokens=True)
    seen = record(loaded.get_raw_model().model, monkeypatch, told)
    for options in ({}, {"temperature": 0.0}, {"temperature": 0.5}):
        (answer,) = loaded.predict({"messages": QUESTION, "max_tokens": 5, **options})
        if options.get("temperature", 0.0) == 0.0:
            assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
    assert seen == [trained_ids] * 3
    assert [options["do_sample"] for options in told] == [False, False, True], told
    assert told[2]["temperature"] == 0.5


def test_sft_chat(client: MlflowClient, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_chat_model(download_model(URI), None, None)
    seen = record(model.network, monkeypatch)
    list(model.answer(QUESTION, max_new_tokens=2, temperature=0.0))
    assert seen == [trained_ids]


def test_the_downloaded_folder(client: MlflowClient, merged: Path, trained_ids: list[int]) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(URI)) / "model"
    assert {path.name for path in folder.iterdir()} == {path.name for path in merged.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    encoded = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=True
    )
    assert encoded["input_ids"] == trained_ids
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64


def test_nothing_in_the_logged_model_names_this_machine(client: MlflowClient, merged: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(URI))
    texts = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    scratch = ("sft-register-", str(merged))
    assert [path.name for path in texts if any(word in path.read_text("utf-8") for word in scratch)] == []


def test_models_serve_answers_over_http(client: MlflowClient, trained_ids: list[int], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local", "-p", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "OMP_NUM_THREADS": "1", "PATH": path}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "log")
            body = {"messages": QUESTION, "max_tokens": 3}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as response:
                (answer,) = json.load(response)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(SERVER_SECONDS)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    usage = answer["usage"]  # the total is what the network saw and made: a second BOS would count as an answer's token
    assert usage["prompt_tokens"] == len(trained_ids)
    assert usage["total_tokens"] <= len(trained_ids) + 3


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer from {url}: {log.read_text()[-3000:]}")
