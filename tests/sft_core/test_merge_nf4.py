"""Merging into the base that a 4-bit training saw: against the live 4-bit model, and the choice by measurement."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from tests.sft_core.merge_models import altered, save_adapter, save_base, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_base_is_the_live_4_bit_base_bit_for_bit(
    base: Path, adapter: Path, tmp_path: Path, dtype: str
) -> None:
    import bitsandbytes as bnb

    one = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    tensors = {one.format("A"): torch.ones(4, 64), one.format("B"): torch.ones(96, 4)}
    outcome = merge_adapter(
        base,
        altered(adapter, tmp_path / "altered", tensors),
        tmp_path / "out",
        MergeOptions(base="dequantized", compute_dtype=dtype),
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    live = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), quantization_config=quantization, device_map={"": "cpu"}
    )
    merged, original = weights(tmp_path / "out"), weights(base)
    quantized = {f"{name}.weight": m for name, m in live.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantized) == outcome.facts["dequantized"] == 14
    for name, tensor in merged.items():
        if name not in quantized:
            assert torch.equal(tensor, original[name]), name
            continue
        module = quantized[name]
        expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        if name == "model.layers.0.mlp.up_proj.weight":
            expected = (expected.double() + 2.0 * 4).float()
        assert torch.equal(tensor, expected), name
    assert outcome.facts["certificate"]["chosen"] == "dequantized"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "conversations"
    (folder / "heldout").mkdir(parents=True)
    turns = [("user", "abc", 0), ("assistant", "def", 1)]
    messages = [[{"role": r, "content": c * (1 + i % 5), "weight": w} for r, c, w in turns] for i in range(70)]
    table = pa.table({"row_id": [str(i) for i in range(70)], "messages": messages})
    pq.write_table(table, folder / "heldout" / "part-00000.parquet")
    return folder


@pytest.mark.slow
def test_auto_measures_both_and_keeps_the_nearer(base: Path, adapter: Path, held_out: Path, tmp_path: Path) -> None:
    options = MergeOptions(compute_dtype="float32", held_out=held_out)
    outcome = merge_adapter(base, adapter, tmp_path / "out", options)
    certificate = outcome.facts["certificate"]
    kl = {name: figures["kl"] for name, figures in certificate["candidates"].items()}
    assert certificate["certified"]
    assert certificate["chosen"] == outcome.facts["base_weights"] == "dequantized"
    assert (certificate["sequences"], certificate["tokens"] > 64 * 3) == (64, True)
    assert abs(kl["dequantized"]) < 1e-5 < kl["full"]
    assert certificate["candidates"]["dequantized"]["top1_agreement"] > 0.98
    merge_adapter(base, adapter, tmp_path / "told", MergeOptions(base="dequantized", compute_dtype="float32"))
    assert all(torch.equal(t, weights(tmp_path / "told")[name]) for name, t in weights(tmp_path / "out").items())
    assert not list(tmp_path.glob(".out-*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"certified": true' in card


def test_a_model_over_the_bound_is_refused(base: Path, adapter: Path, held_out: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"base": "full", "compute_dtype": "float32", "held_out": held_out, "certify": True}
    outcome = merge_adapter(base, adapter, tmp_path / "near", MergeOptions(**told, max_divergence=10.0))
    measured = outcome.facts["certificate"]["candidates"]["full"]["kl"]
    assert measured > 1e-5  # the full base is not the 4-bit one of the training
    merge_adapter(base, adapter, tmp_path / "at", MergeOptions(**told, max_divergence=measured))
    with pytest.raises(ModelError, match="nats a token from the model that was trained, over"):
        merge_adapter(base, adapter, tmp_path / "over", MergeOptions(**told, max_divergence=measured * 0.99))
    assert not list((tmp_path / "over").glob("*.safetensors"))


def test_auto_without_rows_takes_what_training_saw_and_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    certificate = merge_adapter(base, adapter, tmp_path / "nf4", MergeOptions()).facts["certificate"]
    assert (certificate["certified"], certificate["chosen"]) == (False, "dequantized")
    assert "no held-out rows" in certificate["why"]
    options = MergeOptions(quantization="none")
    certificate = merge_adapter(base, adapter, tmp_path / "none", options).facts["certificate"]
    assert certificate["chosen"] == "full"
