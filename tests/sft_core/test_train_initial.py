"""Adapters that begin with a part of the base, from the first value to the merged model."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError, RecipeError, TrainError
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.recipe import TrainConfig
from sft_core.train import initial
from sft_core.train.checkpoints import Counts, mark_complete
from sft_core.train.initial import INITIAL
from sft_core.train.model import load_trainable
from tests.sft_core.train_runs import (
    child_of,
    config,
    losses,
    train,
    train_here,
    train_together,
    weights,
    weights_hash,
)

PISSA = {"init_lora_weights": "pissa"}
METHODS: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {**PISSA, "lora_dropout": 0.1}},
    "quick pissa, scale by the root": {"lora": {"init_lora_weights": "pissa_niter_2", "use_rslora": True}},
    "pissa, dora": {"lora": {**PISSA, "use_dora": True, "modules_to_save": ["lm_head"]}},
    "pissa, zero2": {"lora": PISSA, "deepspeed": "zero2"},
    "loftq": {"quantization": "nf4", "lora": {"init_lora_weights": "loftq"}, "deepspeed": "zero2"},
}
TOLERANCE = 2e-5
"""Of logits of size 1, in float32."""
TOKENS = torch.arange(3, 40).unsqueeze(0)


def section(method: str, **changes: Any) -> TrainConfig:
    changes = {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-3, **METHODS[method], **changes}
    return config(**changes)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return found


def layers(model: Any) -> dict[str, Any]:
    """Adapted modules by their names in the base."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}


def load(model: Path, method: str, work: Path | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return load_trainable(model, section(method, **changes), False, work)[0]


@pytest.mark.parametrize("method", [name for name in METHODS if "pissa" in name])
def test_pissa_trains_the_principal_part_and_begins_as_the_base(method: str, tiny_model: Path) -> None:
    model, base = load(tiny_model, method), AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=TOLERANCE)
    for name, module in layers(model).items():
        whole, rest = base.get_submodule(name).weight, module.get_base_layer().weight
        sizes = torch.linalg.svdvals(whole.double())
        least = torch.linalg.vector_norm(sizes[4:])  # Eckart and Young: no matrix of rank 4 leaves less
        slack = 1.05 if "quick" in method else 1.0001
        assert least * 0.9999 <= torch.linalg.vector_norm(rest.double()) <= least * slack
        torch.testing.assert_close(rest + module.get_delta_weight("default"), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [{"lora_alpha": 4}, {"lora_alpha": 16}, {"lora_alpha": 8, "use_rslora": True}])
def test_loftq_takes_back_what_rounding_lost_whatever_the_scale(scale: dict[str, Any], tiny_model: Path) -> None:
    model = load(tiny_model, "loftq", lora={"init_lora_weights": "loftq", **scale})
    published = load_file(tiny_model / "model.safetensors")
    for name, module in layers(model).items():
        weight = module.get_base_layer().weight
        rounded, whole = dequantize_4bit(weight.data, weight.quant_state), published[f"{name}.weight"]
        least = torch.linalg.vector_norm(torch.linalg.svdvals((whole - rounded).double())[4:])
        left = (whole - rounded - module.get_delta_weight("default")).detach().double()
        assert float(torch.linalg.vector_norm(left)) == pytest.approx(float(least), rel=1e-4)


def test_loftqs_result_is_kept_until_a_checkpoint_has_it(
    packed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    first = load(tiny_model, "loftq", work).state_dict()
    svd = initial.largest_part
    monkeypatch.setattr(initial, "largest_part", lambda *_: pytest.fail("made once more"))
    again = load(tiny_model, "loftq", work).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items() if "lora_" in name)
    assert float(first["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"].abs().max()) > 0
    monkeypatch.setattr(initial, "largest_part", svd)
    wanted = section("loftq", deepspeed=None, save_total_limit=9)
    whole = train_here(packed, tiny_model, tmp_path, wanted)
    halfway = tmp_path / "resumed" / "work" / "checkpoint-2"
    shutil.copytree(tmp_path / "work" / "checkpoint-2", halfway)
    monkeypatch.setattr(initial, "largest_part", lambda *_: pytest.fail("the checkpoint has A and B"))
    resumed = train_here(packed, tiny_model, tmp_path / "resumed", wanted)
    assert weights_hash(resumed) == weights_hash(whole)


def test_a_later_start_has_the_same_base_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    method = "quick pissa, scale by the root"  # its SVD draws random numbers
    first = load(tiny_model, method, tmp_path)
    after = torch.rand(1)
    again = load(tiny_model, method, tmp_path)
    assert torch.equal(after, torch.rand(1))  # and both starts leave the generator at the same place
    torch.manual_seed(1)
    other = load_trainable(tiny_model, section(method), False, tmp_path)[0]
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / INITIAL).rename(tmp_path / "checkpoint-2" / INITIAL)  # another machine got the checkpoint alone
    mark_complete(tmp_path / "checkpoint-2", 1, Counts())
    elsewhere = load_trainable(tiny_model, section(method), False, tmp_path)[0]
    assert (tmp_path / INITIAL).read_bytes() == (tmp_path / "checkpoint-2" / INITIAL).read_bytes()
    for model in (again, other, elsewhere):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in first.state_dict().items())
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / INITIAL).unlink()
    torch.manual_seed(1)
    anew = load_trainable(tiny_model, section(method), False, tmp_path)[0]
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert not torch.equal(anew.state_dict()[name], first.state_dict()[name])


def test_in_bfloat16_the_base_gives_up_what_the_rounded_adapter_holds(tiny_model: Path) -> None:
    model = load(tiny_model, "pissa", dtype="bfloat16")
    for name, module in layers(model).items():
        for part in (module.lora_A.default.weight, module.lora_B.default.weight):
            assert part.dtype == torch.float32
            assert torch.equal(part, part.bfloat16().float())
        whole = load_file(tiny_model / "model.safetensors")[f"{name}.weight"].bfloat16().float()
        rest = whole - module.get_delta_weight("default")
        assert torch.equal(module.get_base_layer().weight, rest.bfloat16())


def convert(checkpoint: Path, out: Path, train_section: TrainConfig, base: Path) -> Path:
    quantization = {"quantization": train_section.quantization, "compute_dtype": "float32"}
    options = ConvertOptions(base=base, tokenizer=base, quantization=quantization)
    convert_checkpoint(checkpoint, out, train_section.lora, "some/base", options)
    return out


@pytest.fixture(scope="module")
def under_zero2(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Methods under DeepSpeed, all in one process."""
    sections = {method: section(method) for method, changes in METHODS.items() if "deepspeed" in changes}
    return train_together(packed, tiny_model, tmp_path_factory.mktemp("zero2"), sections)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trained_converted_and_merged_is_what_was_trained(
    method: str, under_zero2: dict[str, Path], packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = section(method)
    out = under_zero2.get(method) or train_here(packed, tiny_model, tmp_path, wanted)
    assert losses(out)[-1] < losses(out)[0]
    live = load_trainable(tiny_model, wanted, False, out.parent / "work")[0]
    before = logits(live)
    set_peft_model_state_dict(live, weights(out))
    trained = logits(live)
    assert float((trained - before).abs().max()) > 100 * TOLERANCE
    adapter = convert(out / "checkpoint", tmp_path / "adapter", wanted, tiny_model)
    base = "full" if wanted.quantization == "none" else "dequantized"
    merge_adapter(tiny_model, adapter, tmp_path / "merged", MergeOptions(base=base))  # type: ignore[arg-type]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=TOLERANCE)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True  # PEFT loads it as any other
    assert settings["r"] == (8 if "pissa" in method else 4)


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts
def test_a_killed_run_ends_with_the_same_bytes(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    wanted = section("pissa")
    straight = train_here(packed, tiny_model, tmp_path / "straight", wanted)

    def kill(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(child_of(os.getpid()), signal.SIGKILL)

    with pytest.raises(TrainError, match="ended with status -9"):
        train(packed, tiny_model, tmp_path / "killed", wanted, kill)
    out = train(packed, tiny_model, tmp_path / "killed", wanted)
    assert weights_hash(out) == weights_hash(straight)
    assert losses(out) == losses(straight)


def test_convert_refuses_a_checkpoint_that_does_not_say_where_it_began(tiny_model: Path, tmp_path: Path) -> None:
    work, checkpoint = tmp_path / "work", tmp_path / "out" / "checkpoint"
    work.mkdir()
    model, kept = load(tiny_model, "pissa", work), work / INITIAL

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            convert(checkpoint, tmp_path / "adapter", section("pissa"), tiny_model)

    model.save_pretrained(checkpoint)
    refused("no initial_adapter.safetensors that says what was taken out")
    shutil.copy(kept, checkpoint / INITIAL)
    refused("those that training began with")
    (checkpoint / INITIAL).write_bytes(kept.read_bytes()[:-5])
    refused("torn or no safetensors file")
    save_file({name: value for name, value in load_file(kept).items() if "q_proj" not in name}, checkpoint / INITIAL)
    refused("is of another adapter")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 65}, "r 65 with init_lora_weights pissa: .* no more than 64 directions"),
        ({"target_modules": ["lm_head"]}, "lm_head shares its weight with the embeddings"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ],
)
def test_what_has_no_principal_part_of_its_own_is_refused(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tied = LlamaConfig(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(tied).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_trainable(tmp_path, config(lora={**PISSA, **lora}), False)
