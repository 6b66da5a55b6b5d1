"""Merging into the full base: against XTuner's real adapters, against PEFT's own merge; and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sft_core.convert import convert_checkpoint
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.recipe import LoraConfig
from tests.sft_core.merge_models import SHARDS, altered, files, save_adapter, save_base, save_tokenizer, weights

XTUNER = Path(__file__).parents[3] / "shared" / "checkpoints" / "xtuner"
FULL = MergeOptions(base="full", compute_dtype="float32")

needs_xtuner = pytest.mark.skipif(not XTUNER.is_dir(), reason=f"XTuner's checkpoints are not at {XTUNER}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@needs_xtuner
@pytest.mark.parametrize("run", ["lora/iter_4.pth", "lora_ds2/iter_4.pth"])
def test_xtuner_checkpoint_converted_and_merged(tmp_path: Path, run: str) -> None:
    convert_checkpoint(XTUNER / run, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=16), "base")
    merge_adapter(XTUNER / "base", tmp_path / "adapter", tmp_path / "out", FULL)
    expected = load_file(XTUNER / "expected" / f"{run.partition('/')[0]}.merged_fp32.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(got) == sorted(expected)
    lora, base = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), weights(XTUNER / "base")
    for name, tensor in expected.items():  # summed in float64, stored in float32
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        size = base[name].abs()
        if key.format("A") in lora:
            size = size + 4 * lora[key.format("B")].abs() @ lora[key.format("A")].abs()
        assert bool(((got[name] - tensor).abs() <= (4 + 5) * 2**-24 * size).all()), name


def test_merged_folder_computes_what_pefts_merge_computes(base: Path, adapter: Path, tmp_path: Path) -> None:
    outcome = merge_adapter(base, adapter, tmp_path / "out", FULL)
    assert {path.name for path in (tmp_path / "out").iterdir()} == SHARDS | {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {key: outcome.facts[key] for key in ("merged", "dequantized", "swallowed_by_rounding", "tensors")} == {
        "merged": 14,
        "dequantized": 0,
        "swallowed_by_rounding": 0,
        "tensors": 21,
    }
    ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_merged_model_stops_where_the_template_ends_a_turn(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, adapter, tmp_path / "out", FULL)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([1, 3], 1)
    assert "_from_model_config" not in generation
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 3]


def test_the_template_of_training_goes_before_the_tokenizers_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = MergeOptions(base="full", chat_template="{{ messages }}")
    merge_adapter(base, adapter, tmp_path / "out", options)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_quantization_config_of_the_base_is_dropped(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    copy.mkdir()
    for name, content in files(base).items():
        (copy / name).write_bytes(content)
    config = json.loads((base / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    merge_adapter(copy, adapter, tmp_path / "out", FULL)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_equal_inputs_give_equal_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        merge_adapter(base, adapter, tmp_path / out, MergeOptions())
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_rslora_divides_by_the_root_of_the_rank(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, altered(adapter, tmp_path / "altered", use_rslora=True), tmp_path / "out", FULL)
    name = "model.layers.1.mlp.up_proj"
    lora = load_file(tmp_path / "altered" / "adapter_model.safetensors")
    update = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    expected = weights(base)[f"{name}.weight"] + 8 / math.sqrt(4) * update
    torch.testing.assert_close(weights(tmp_path / "out")[f"{name}.weight"], expected)


def test_a_bfloat16_base_is_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", None)
    outcome = merge_adapter(tmp_path / "base", adapter, tmp_path / "out", FULL)
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact = tensor.double()
        if f"{key}.lora_A.weight" in lora:
            exact = exact + 2 * lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
        low, high = (exact - 2**-22).to(torch.bfloat16), (exact + 2**-22).to(torch.bfloat16)  # the sum is in fp32
        assert bool(((low <= after[name]) & (after[name] <= high)).all()), name
    assert (outcome.facts["merged"], outcome.facts["swallowed_by_rounding"]) == (14, 0)


# --- refused ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "do not fit r = 2"),
        ({"use_dora": True}, "the adapter is incomplete"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 5}, "do not fit r = 5"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    base: Path, adapter: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        merge_adapter(base, altered(adapter, tmp_path / "altered", **settings), tmp_path / "out", FULL)


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        (
            "base_model.model.model.layers.9.mlp.up_proj.lora_{}.weight",
            (96, 64),
            "has no model.layers.9.mlp.up_proj",
        ),
        ("base_model.model.model.embed_tokens.lora_embedding_{}", (96, 64), "with 64 token rows, the base has 40"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight", (96, 32), "trained on another model"),
    ],
)
def test_adapter_tensors_that_fit_nowhere_are_refused(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    key: str,
    shape: tuple[int, int],
    says: str,
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[key.format("A")], tensors[key.format("B")] = torch.ones(4, shape[1]), torch.ones(shape[0], 4)
    with pytest.raises(ModelError, match=says):
        merge_adapter(base, altered(adapter, tmp_path / "altered", tensors), tmp_path / "out", FULL)


@pytest.mark.parametrize("options", [FULL, MergeOptions()], ids=["full", "dequantized"])
def test_a_merge_that_changes_nothing_is_refused(
    base: Path, adapter: Path, tmp_path: Path, options: MergeOptions
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    inert = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(ModelError, match="equals its base"):
        merge_adapter(base, altered(adapter, tmp_path / "altered", inert), tmp_path / "out", options)
