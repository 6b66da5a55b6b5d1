"""Data sets and models by their hub ids: the libraries' own clients, a hub on loopback, the commands of a user."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.commands import Commands
from tests.conftest import make_tiny_model
from tests.hub_server import TOKEN, Hub, hub

pytestmark = pytest.mark.slow

RECIPE = """
name: orders
store: ./store
base_model: {path: me/tiny}
datasets: [{path: me/rows, map_fn: alpaca}]
eval_fraction: 0.2
pack: {max_length: 64, chat_template: chatml}
train:
  quantization: none
  deepspeed: null
  dtype: float32
  lora: {r: 4, lora_alpha: 8, lora_dropout: 0.0}
  max_steps: 3
  learning_rate: 1.0e-2
  gradient_checkpointing: false
"""
ROWS, MORE_ROWS, MODEL = "a" * 40, "c" * 40, "b" * 40


class Project:
    """A user's folder, whose commands know one hub only."""

    def __init__(self, folder: Path, server: Hub) -> None:
        self.folder, self.server = folder, server
        hub_settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        self.commands = Commands(folder / "commands", COLUMNS="400", **hub_settings)  # read when they are imported
        (folder / "recipe.yaml").write_text(RECIPE)

    def sft(self, *arguments: str, ok: bool = True, **environment: str) -> str:
        """What it says; `server.asked` has the requests of this command."""
        self.server.asked.clear()
        done = self.commands.run(self.folder, *arguments, **environment)
        assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
        assert ok or done.returncode == 1
        return done.stdout + done.stderr

    def downloads(self) -> set[str]:
        """Names of the files that the last command fetched."""
        return {line.rpartition("/")[2] for line in self.server.asked if line.startswith("GET") and "/resolve/" in line}


def publish_rows(server: Hub, commit: str, count: int) -> None:
    folder = server.set_main("datasets", "me/rows", commit)
    rows = [{"instruction": f"say w{i}", "input": "", "output": f"w{i}!"} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("hub")
    with hub(folder / "hub") as server:
        publish_rows(server, ROWS, 60)
        model = make_tiny_model(server.set_main("models", "me/tiny", MODEL))
        (model / "original").mkdir()
        for double in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
            (model / double).write_bytes(b"another format")
        made = Project(folder, server)
        yield made
        made.commands.end()


@pytest.fixture(scope="module")
def checkpoint(project: Project) -> Path:
    """Trained from the hub's rows on the hub's model."""
    said = project.sft("train", "recipe.yaml")
    return Path(said.strip().splitlines()[-1].removeprefix("checkpoint: "))


def test_training_takes_each_file_of_the_model_once_and_in_one_format(project: Project, checkpoint: Path) -> None:
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert project.downloads() == {
        *("rows.jsonl", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_what_was_published_since_is_new_data(project: Project, checkpoint: Path) -> None:
    lines = project.sft("explain", "recipe.yaml").splitlines()
    verdicts = {line.split()[0]: line.split()[2] for line in lines if len(line.split()) > 2}
    assert {verdicts[step] for step in ("fetch/0", "normalize", "pack", "train")} == {"reused"}
    publish_rows(project.server, MORE_ROWS, 61)
    said = project.sft("explain", "recipe.yaml")
    assert f"source.commit: {ROWS} -> {MORE_ROWS}" in said
    publish_rows(project.server, ROWS, 60)


def test_a_gated_model_needs_a_token(project: Project, checkpoint: Path) -> None:
    project.server.gated.add("me/tiny")
    try:
        said = project.sft("explain", "recipe.yaml", ok=False)
        assert said.strip().startswith("error: base_model.path 'me/tiny': no such folder")
        assert (
            "GatedRepoError: 401 Client Error. Check the spelling, the network and, for a gated model, HF_TOKEN" in said
        )
        project.sft("explain", "recipe.yaml", HF_TOKEN=TOKEN)
    finally:
        project.server.gated.clear()


def test_a_merged_model_is_pushed_whole(project: Project, checkpoint: Path) -> None:
    base = project.server.root / "models" / "me/tiny" / MODEL
    project.sft("convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "adapter")
    merge = ("convert", "merge", str(base), "adapter", "merged", "--base", "full", "--push-to", "me/merged")
    said = project.sft(*merge, ok=False)
    assert "error: --push-to 'me/merged': not uploaded (Client error '401 Unauthorized'" in said
    assert "merged is complete, upload it with `hf upload`" in said
    (project.folder / "merged").rename(project.folder / "merged-before")
    assert "uploaded: http" in project.sft(*merge, HF_TOKEN=TOKEN)
    pushed = project.server.commit_of("models", "me/merged", "main")
    assert pushed is not None
    there = project.server.root / "models" / "me/merged" / pushed
    here = {path.name: path.read_bytes() for path in (project.folder / "merged").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == here
    assert AutoModelForCausalLM.from_pretrained(there).num_parameters() > 0
    assert load_file(there / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
