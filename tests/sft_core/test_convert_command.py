"""`sft convert` itself: its flags, and that what is wrong ends in one line and exit status 1."""

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.main import main

RECIPE = """
name: adapters
base_model: {path: %s}
datasets: [{path: rows.jsonl}]
train: {quantization: none, dtype: float32, lora: {r: 2, lora_alpha: 4}}
"""
MODULES = ("q_proj", "v_proj")
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a recipe, and XTuner's checkpoint of an adapter of rank 3 on two modules."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE % tiny_model)
    torch.save({"meta": {"iter": 4}, "state_dict": state(tiny_model)}, tmp_path / "iter_4.pth")
    return tmp_path


def state(base: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {}
    for name, weight in model.named_parameters():
        _, _, module = name.removesuffix(".weight").rpartition(".")
        if module in MODULES:
            prefix = f"llm.base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.default.weight"] = torch.randn(3, weight.shape[1]) / 8
            tensors[f"{prefix}.lora_B.default.weight"] = torch.randn(weight.shape[0], 3) / 8
    return tensors


def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    monkeypatch.setattr(sys, "argv", ["sft", *arguments])
    for process_wide in ("set_defaults", "quiet_libraries"):  # of no concern to the tests that follow
        monkeypatch.setattr(f"cli.main.{process_wide}", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), captured.out + captured.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: sft(capsys, monkeypatch, "convert", *arguments)


def assert_refused(answer: tuple[int, str], says: str) -> None:
    code, text = answer
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in text


FLAGS = ("--r", "3", "--lora-alpha", "12", "--target-modules", "q_proj", "--target-modules", "v_proj")


def test_the_flags_go_before_the_recipe(folder: Path, run: Any) -> None:
    assert_refused(run("pth-to-hf", "recipe.yaml", "iter_4.pth", "a"), "not of rank train.lora.r = 2")
    assert_refused(run("pth-to-hf", "recipe.yaml", "iter_4.pth", "b", "--r", "3"), "(20 missing, 0 too many of 28)")
    code, text = run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS, "--dtype", "bfloat16")
    assert (code, "adapter: 8 tensors" in text) == (0, True)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12, ["q_proj", "v_proj"])
    stored = torch.load(folder / "iter_4.pth")["state_dict"]
    for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        original = stored[f"llm.{name.replace('.weight', '.default.weight')}"]
        assert torch.equal(tensor, original.bfloat16()), name
    assert_refused(run("pth-to-hf", "recipe.yaml", "iter_4.pth", "c", *FLAGS, "--dtype", "int4"), "dtype 'int4'")
    assert_refused(run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS), "not empty")


def test_what_training_recorded_is_what_merge_reads(folder: Path, tiny_model: Path, run: Any) -> None:
    assert run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS)[0] == 0
    recorded = folder / "adapter" / "quantization.json"
    assert json.loads(recorded.read_text()) == {"quantization": "none", "compute_dtype": "float32"}
    merged = ("merge", str(tiny_model), "adapter")
    assert "into the full base weights" in run(*merged, "plain", "--base", "auto")[1]
    recorded.write_text('{"quantization": "nf4", "compute_dtype": "float32"}')
    assert "into the dequantized base weights" in run(*merged, "nf4", "--base", "auto")[1]
    recorded.write_text('{"quantization": "int3"}')
    assert_refused(run(*merged, "wrong"), "quantization 'int3'")


def test_certify_with_measures_and_says_so(folder: Path, tiny_model: Path, run: Any) -> None:
    assert run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS)[0] == 0
    messages = [{"role": "user", "content": "say w1"}, {"role": "assistant", "content": "w1!"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    merged = ("merge", str(tiny_model), "adapter")
    assert_refused(run(*merged, "a", "--certify-with", "rows.jsonl"), "nothing is certified")  # no chat template
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (folder / "adapter" / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (folder / "adapter" / "tokenizer_config.json").write_bytes((tiny_model / "tokenizer_config.json").read_bytes())
    (folder / "adapter" / "chat_template.jinja").write_text(template)
    code, text = run(*merged, "b", "--certify-with", "rows.jsonl", "--max-shard-size", "200KB")
    assert (code, "certified: {'full': {'kl': " in text) == (0, True)
    assert '"certified": true' in (folder / "b" / "README.md").read_text()
    assert len(list((folder / "b").glob("model-*.safetensors"))) > 1
    (folder / "rows.jsonl").write_text('{"text": "no messages"}\n')
    assert_refused(run(*merged, "c", "--certify-with", "rows.jsonl"), "row 1 has no list `messages`")
    assert_refused(run(*merged, "d", "--certify-with", "absent.jsonl"), "no such file")
    assert_refused(run(*merged, "e", "--max-shard-size", "much"), "say a size")


def test_what_fails_or_is_stopped_leaves_nothing(
    folder: Path, tiny_model: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS)[0] == 0
    merged = ("merge", str(tiny_model), "adapter")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file that cannot grow, as on a full disk
    try:
        assert_refused(run(*merged, "full"), "File too large; nothing was written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert_refused(run(*merged, "small"), "GB are to be written, the disk has 0.0 GB left")
    monkeypatch.undo()
    monkeypatch.chdir(folder)

    def stop(out: Path, *_: Any) -> None:
        assert out == Path("stopped/.unfinished")
        assert (out / "model.safetensors").is_file()
        assert not (out.parent / "config.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("sft_core.merge.choice.write_card", stop)
    assert run(*merged, "stopped")[0] == 130
    assert not {"full", "small", "stopped"} & {path.name for path in folder.iterdir()}
    (folder / "killed" / ".unfinished").mkdir(parents=True)
    assert_refused(run(*merged, "killed"), "remove .unfinished, which a killed run left")
    assert_refused(run(*merged, str(tiny_model)), "choose another folder")


def test_an_upload_that_fails_leaves_the_folder_and_says_why(
    folder: Path, tiny_model: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("pth-to-hf", "recipe.yaml", "iter_4.pth", "adapter", *FLAGS)[0] == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answer = run("merge", str(tiny_model), "adapter", "merged", "--push-to", "someone/model")
    assert_refused(answer, "--push-to 'someone/model': not uploaded")
    assert (folder / "merged" / "model.safetensors").is_file()
    assert_refused(run("merge", str(tiny_model), "adapter", "other", "--push-to", "not a name"), "not uploaded")


def _zipped(path: Path, text: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)


class Touch:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


HOSTILE: dict[str, tuple[Any, str]] = {
    "runs": (lambda path: torch.save({"state_dict": {"x": Touch()}}, path), "the pickle names posix.system"),
    "name of two lines": (
        lambda path: _zipped(path, b"\x80\x04\x8c\x02os\x8c\x05sy\nst\x93."),
        "the pickle names os.sy\u240ast, which no checkpoint",
    ),
    "inst": (lambda path: _zipped(path, b"(S'touch executed'\nios\nsystem\n."), "the opcode INST"),
    "long": (lambda path: _zipped(path, b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"a."), "torn"),
    "legacy": (lambda path: path.write_bytes(pickle.dumps(Touch())), "torn, or not a zip file"),
    "list": (lambda path: torch.save([1, 2], path), "holds a list"),
    "text": (lambda path: torch.save({"state_dict": {"x": "y"}}, path), "x, which is no tensor"),
    "nothing": (lambda path: path.write_bytes(b""), "torn, or not a zip file"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_end_in_one_line(folder: Path, run: Any, name: str) -> None:
    write, says = HOSTILE[name]
    write(folder / "hostile.pth")
    assert_refused(run("pth-to-hf", "recipe.yaml", "hostile.pth", "out"), says)
    assert not (folder / "executed").exists()
    assert not list((folder / "out").glob("*"))
