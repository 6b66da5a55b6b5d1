"""The bound that `sft_core/merge/arithmetic.py` states, element by element: to the exact sum, and to PEFT's merge."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, arithmetic, merge_adapter

FULL = MergeOptions(base="full")
UNIT = 2.0**-24
"""Half a unit in the last place of fp32: the error of one rounding."""
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of very different sizes, so that every rounding shows somewhere."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 ** torch.randint(-3, 3, parameter.shape))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**settings: Any) -> Path:
        torch.manual_seed(1)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 10.0 ** torch.randint(-3, 1, parameter.shape))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("settings", [{"r": 1}, {"r": 4}, {"r": 7, "use_rslora": True}, {"r": 64}], ids=str)
def test_an_element_is_within_the_stated_bound(
    base: Path, adapter: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = adapter(lora_alpha=11, **settings)
    merge_adapter(base, folder, tmp_path / "out", FULL)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    theirs = live.merge_and_unload().state_dict()
    before, lora = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    r = settings["r"]
    scale = 11 / math.sqrt(r) if settings.get("use_rslora") else 11 / r
    updated = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in lora:
            assert torch.equal(ours[name], weight), name
            continue
        a, b = lora[f"{key}.lora_A.weight"].double(), lora[f"{key}.lora_B.weight"].double()
        exact = weight.double() + scale * (b @ a)
        bound = (r + 4) * UNIT * (weight.double().abs() + scale * (b.abs() @ a.abs()))
        assert bool(((ours[name].double() - exact).abs() <= bound).all()), name
        assert bool(((ours[name].double() - theirs[name].double()).abs() <= 2 * bound).all()), name
        updated += 1
    assert updated == 14


def test_chunks_of_rows_make_no_difference(
    base: Path, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(r=4, lora_alpha=8, use_dora=True)
    merge_adapter(base, folder, tmp_path / "whole", FULL)
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", 64 * 5)
    threads = torch.get_num_threads()
    merge_adapter(base, folder, tmp_path / "cut", FULL)
    assert torch.get_num_threads() == threads
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "cut" / "model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=2**-20, atol=2**-20, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_sum_that_its_dtype_cannot_hold_is_refused(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for values in ([1.0, largest], [-largest, 0.0], []):
        fine = torch.tensor(values)
        arithmetic.check_finite("w", fine.to(dtype))
    for value in (math.inf, -math.inf, math.nan, *([7e4] if dtype == torch.float16 else [])):
        over = torch.tensor([1.0, value, 2.0])
        with pytest.raises(ModelError, match="base: w: the merged weight overflows"):
            arithmetic.check_finite("w", over.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_is_not_finite_where_it_is_merged_is_refused(
    base: Path, adapter: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    folder, torn = adapter(r=2, lora_alpha=4), tmp_path / "torn"
    shutil.copytree(base, torn)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    name = next(name for name in weights if "q_proj" in name)
    weights[name][-1, -1] = value
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"base: {name}: .* holds NaN or infinity there"):
        merge_adapter(torn, folder, tmp_path / "out", FULL)
