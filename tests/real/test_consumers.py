"""The ways of docs/consumers.md to use a registered version, on a real model: all give the same greedy answers.

The expected token ids are those of plain transformers on the downloaded folder.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.conftest import ROOT, Retrained
from tests.tasks.test_models_consumers import SERVER_SECONDS, wait_for

URI = "models:/demo_real@champion"
QUESTIONS = ("Where is order BX4712?", "Please cancel order QF3081.", "Tell me a joke.")
"""Two of the kind that was trained, and one that was not."""
LIMIT = 24
"""Tokens an answer."""
IM_END = 2


@pytest.fixture(scope="module")
def registry(retrained: Retrained) -> Retrained:
    """MLflow set to where the version was registered."""
    os.environ["MLFLOW_TRACKING_URI"] = retrained.tracking_uri
    retrained.client()
    return retrained


@pytest.fixture(scope="module")
def folder(registry: Retrained) -> Path:
    """The version's Hugging Face folder, as docs/consumers.md downloads it."""
    return Path(mlflow.artifacts.download_artifacts(URI)) / "model"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """Of each question: the answer's token ids without the end token, by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = {}
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers[question] = [token for token in ids.tolist() if token != IM_END]
    assert all(answers.values())
    assert "BX4712" in tokenizer.decode(answers[QUESTIONS[0]])
    return answers


@pytest.fixture(scope="module")
def texts(folder: Path, expected: dict[str, list[int]]) -> dict[str, str]:
    """The same answers as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {question: tokenizer.decode(ids, skip_special_tokens=True).strip() for question, ids in expected.items()}


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def made_by(network: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ids that the network makes from here on, an answer an entry, without prompt and end token."""
    made: list[list[int]] = []
    generate = network.generate

    def recording(*arguments: Any, **options: Any) -> Any:
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        out = generate(*arguments, **options)
        made.append([token for token in out[0, ids.shape[1] :].tolist() if token != IM_END])
        return out

    monkeypatch.setattr(network, "generate", recording)
    return made


def test_mlflow_transformers(
    registry: Retrained, expected: dict[str, list[int]], texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = mlflow.transformers.load_model(URI)
    made = made_by(pipeline.model, monkeypatch)
    for question in QUESTIONS:
        answer = pipeline(messages(question), max_new_tokens=LIMIT, do_sample=False)[0]["generated_text"][-1]
        assert answer["content"].strip() == texts[question]
    assert made == list(expected.values())


def test_mlflow_pyfunc(
    registry: Retrained, expected: dict[str, list[int]], texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlflow.pyfunc.load_model(URI)
    made = made_by(model.get_raw_model().model, monkeypatch)
    for question in QUESTIONS:
        (answer,) = model.predict({"messages": messages(question), "max_tokens": LIMIT})
        assert answer["choices"][0]["message"]["content"].strip() == texts[question]
    assert made == list(expected.values())


def test_http(registry: Retrained, expected: dict[str, list[int]], texts: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local", "-p", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by name
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, "PATH": path}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "log")
            for question in QUESTIONS:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/invocations",
                    json.dumps({"messages": messages(question), "max_tokens": LIMIT}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as response:
                    (answer,) = json.load(response)
                assert answer["choices"][0]["message"]["content"].strip() == texts[question]
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(SERVER_SECONDS)


def test_sft_chat_as_the_summary_says(registry: Retrained, texts: dict[str, str]) -> None:
    """The command of the summary's line `chat`, typed as it stands there."""
    line = next(line for line in registry.printed.splitlines() if line.startswith("chat "))
    command = line.removeprefix("chat").strip()
    command = re.sub(r"\S*sft chat", "sft chat", command)  # there may be a folder before it
    assert command.endswith(f"sft chat {URI}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    typed = f'sft() {{ {sys.executable} -P -m cli.main "$@"; }}; {command} --max-new-tokens {LIMIT}'
    done = subprocess.run(
        ["bash", "-c", typed],
        cwd=registry.folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        input="\n/reset\n".join(QUESTIONS) + "\n/exit\n",
        capture_output=True,
        text=True,
        timeout=SERVER_SECONDS * 4,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[: len(QUESTIONS)] == list(texts.values())
    assert done.stderr == ""
