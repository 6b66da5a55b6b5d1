"""An adapter says which base it was trained on, and merging it into another one is refused."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cli.main import main
from sft_core.base_check.identity import RECORD, identity_of, weights_fingerprint
from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.recipe import LoraConfig
from tests.sft_core.merge_models import save_adapter, save_base, weights

LORA = LoraConfig(r=4, lora_alpha=8)
FULL = MergeOptions(base="full")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, `other` of the same shape, and in `run` (the present folder) what training left on `base`."""
    save_base(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    for path in (tmp_path / "other").glob("*.safetensors"):
        save_file({name: t + 0.25 for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "base", tmp_path / "run" / "checkpoint")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path


@pytest.fixture
def adapter(project: Path) -> Path:
    """Converted, with the base named as people name it."""
    options = ConvertOptions(base=Path("../base"), tokenizer=Path("checkpoint"))
    convert_checkpoint(Path("checkpoint"), project / "adapter", LORA, "../base", options)
    return project / "adapter"


def test_a_folder_is_recorded_by_name_and_fingerprint_and_peft_loads_the_adapter(project: Path, adapter: Path) -> None:
    found = weights_fingerprint(project / "base")
    record = {"commit": None, "name": "base", "on_hub": False, "weights": found}
    assert json.loads((adapter / RECORD).read_text()) == record
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "base"), adapter)


def test_the_base_of_the_training_is_known_wherever_it_lies_and_however_it_is_cut(project: Path, adapter: Path) -> None:
    AutoModelForCausalLM.from_pretrained(project / "base", dtype="auto").save_pretrained(project / "moved")
    assert (project / "moved" / "model.safetensors").is_file()
    outcome = merge_adapter(project / "moved", adapter, project / "out", FULL)
    assert outcome.facts["base"] == "the weights the adapter was trained on"
    card = (project / "out" / "README.md").read_text()
    assert f"- base model: base (a local folder), weights {weights_fingerprint(project / 'base')[:12]}\n" in card
    assert "\nbase_model:" not in card  # the hub takes ids alone


def test_another_base_of_the_same_shape_is_refused_unless_asked_for(
    project: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, other = (weights_fingerprint(project / name)[:12] for name in ("base", "other"))
    command = ["sft", "convert", "merge", "../other", str(adapter), str(project / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert not (project / "out").exists()
    assert (
        f"error: {adapter} was trained on base (a local folder), weights {trained}, and the base ../other has other "
        f"weights ({other}) of the same kind: the merged model would be neither. Give the base of the training; to "
        "merge all the same, --other-base\n"
    ) in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "--other-base"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert (
        f"base: other weights than the adapter was trained on (base (a local folder), weights {trained}), as was "
        in (capsys.readouterr().out)
    )
    assert weights(project / "out")


def test_an_adapter_of_another_program_is_merged_and_not_compared(project: Path) -> None:
    checkpoint = Path("checkpoint")
    outcome = merge_adapter(project / "other", checkpoint, project / "out", FULL)
    assert outcome.facts["base"] == "not compared: checkpoint does not record the weights it was trained on"
    (project / "adapter").mkdir()
    shutil.copytree(checkpoint, project / "adapter", dirs_exist_ok=True)
    (project / "adapter" / RECORD).write_text('{"name": "x"}')
    with pytest.raises(ModelError, match=r"base_model\.json: no record of a base model"):
        merge_adapter(project / "base", project / "adapter", project / "out", FULL)


def test_a_hub_id_stays_and_its_snapshot_tells_the_commit(project: Path) -> None:
    snapshot = project / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(project / "base", snapshot)
    for given in ("owner/name", str(snapshot)):
        found = identity_of(given, snapshot)
        assert (found.name, found.on_hub, found.commit) == ("owner/name", True, "a" * 40)
        assert found.weights == weights_fingerprint(project / "base")
        assert found.metadata() == 'base_model: "owner/name"\n'
    unknown = identity_of("owner/name", None)
    assert (unknown.name, unknown.weights) == ("owner/name", None)
    assert identity_of("gpt2", None).on_hub


def test_one_changed_number_in_a_sampled_block_is_another_model(project: Path) -> None:
    before = weights_fingerprint(project / "base")
    shard = sorted((project / "base").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    large = max(tensors, key=lambda name: tensors[name].numel())
    tensors[large].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert weights_fingerprint(project / "base") != before


def test_a_bin_file_of_the_same_weights_is_the_same_model(project: Path) -> None:
    before = weights_fingerprint(project / "base")
    tensors = weights(project / "base")
    for path in [*(project / "base").glob("*.safetensors"), project / "base" / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(tensors, project / "base" / "pytorch_model.bin")
    assert weights_fingerprint(project / "base") == before
