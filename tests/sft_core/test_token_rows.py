"""`train.lora.trainable_tokens`: rows of single tokens are trained, saved, converted and merged, and nothing beside."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError, RecipeError
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.recipe import LoraConfig, TrainConfig
from sft_core.train.fit import check_adapter
from sft_core.train.limits import check_training
from sft_core.train.model import load_trainable
from tests.sft_core.train_runs import config, make_packed, run_together, train_here

TOKENS = ["<|im_end|>", "<|im_start|>"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "layer_types": ["full_attention"] * 2},  # scaled embedding
    "gpt_neox": {"model_type": "gpt_neox"},  # embed_in, embed_out
}


@pytest.fixture(params=list(FAMILIES))
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny model of each family, with the tokenizer of the tiny model."""
    return make_base(request.param, tiny_model, tmp_path / "base")


def make_base(family: str, tiny_model: Path, folder: Path) -> Path:
    torch.manual_seed(3)
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    settings = dict(FAMILIES[family])
    made = AutoConfig.for_model(
        settings.pop("model_type"),
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **settings,
    )
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def moved(base: Path, **changes: Any) -> Any:
    """The model as training builds it, every trained number moved."""
    model, _ = load_trainable(base, config(lora={"trainable_tokens": TOKENS}, **changes), trust_remote_code=False)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.tensor([[5, 9, 1, 7, 2, 1, 100, 2], [2, 2, 40, 1, 41, 42, 43, 1]])
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def test_the_forward_is_pefts_own(base: Path) -> None:
    model = moved(base)
    loss, gradients = loss_and_gradients(model)
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            del layer.forward  # PEFT's again
    expected_loss, expected = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    rows = [name for name in gradients if "trainable_tokens_delta" in name]
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert all(bool(gradients[name].any(dim=1).all()) for name in rows)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_are_kept_in_float32_and_are_all_that_is_trained_of_the_embeddings(quantization: str, base: Path) -> None:
    model = moved(base, dtype="bfloat16", quantization=quantization)
    found = {name: value for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name}
    assert found
    assert all(name.endswith(".token_adapter.trainable_tokens_delta.default") for name in found)
    assert {(value.dtype, tuple(value.shape)) for value in found.values()} == {(torch.float32, (2, 64))}


RUNS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, zero2, nf4": {"deepspeed": "zero2", "quantization": "nf4"},
    "tied, nf4": {"quantization": "nf4"},
    "tied, zero2": {"deepspeed": "zero2"},
    "gemma3, zero1": {"deepspeed": "zero1"},
}
"""Each begins with its family."""


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable[..., Path]
) -> dict[str, tuple[Path, Path, TrainConfig, Path]]:
    """Packed rows, base, section and result of RUNS; those under DeepSpeed in one process."""
    folder, runs = tmp_path_factory.mktemp("rows"), {}
    for name, changes in RUNS.items():
        base = make_base(name.partition(",")[0], tiny_model, folder / name / "base")
        packed = make_packed(folder / name / "data", base, write_conversations)
        runs[name] = (packed, base, config(lora={"trainable_tokens": TOKENS}, max_steps=3, num_processes=1, **changes))
    found = run_together(folder, {name: runs[name] for name, changes in RUNS.items() if "deepspeed" in changes})
    for name, (packed, base, section) in runs.items():
        if name not in found:
            found[name] = train_here(packed, base, folder / name, section)
    return {name: (*runs[name], found[name]) for name in runs}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_merged_model_is_the_base_but_for_the_adapter_and_these_rows(
    name: str, trained: dict[str, tuple[Path, Path, TrainConfig, Path]], tmp_path: Path
) -> None:
    packed, base, section, out = trained[name]
    family, checkpoint = name.partition(",")[0], out / "checkpoint"
    options = ConvertOptions(base=base, tokenizer=packed / "tokenizer", dtype=None)
    convert_checkpoint(checkpoint, tmp_path / "adapter", section.lora, str(base), options)
    outcome = merge_adapter(
        base, tmp_path / "adapter", tmp_path / "merged", MergeOptions(base="full", quantization="none")
    )
    assert outcome.facts["merged_by"] == "a stream over the base's files"
    ids = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(TOKENS)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    tables = [table for table in before if before[table].shape == (259, 64)]
    assert len(tables) == (1 if family in ("tied", "gemma3") else 2)
    for table in tables:
        changed = (before[table] != after[table]).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(ids)
        assert float((before[table] - after[table])[ids].abs().max()) > 1e-3
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    given = torch.arange(200).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(given).logits, live(given).logits, rtol=1e-4, atol=1e-4)


def refused(base: Path, *tokens: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_trainable(base, config(lora={"trainable_tokens": tokens}), trust_remote_code=False)
    return str(error.value)


def test_what_cannot_be_trained_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert refused(tiny_model, "<|im_end|>", "<|nothing|>") == (
        "train.lora.trainable_tokens: '<|nothing|>' is no token of the base model's tokenizer; to add it: sft convert "
        "resize BASE OUT --add '<|nothing|>'"
    )
    phi = tmp_path / "phi"
    shutil.copytree(tiny_model, phi, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    settings = AutoConfig.for_model("phi", vocab_size=259, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    AutoModelForCausalLM.from_config(settings).save_pretrained(phi)
    assert "the output head of PhiForCausalLM has a bias, which PEFT leaves out of single rows" in refused(
        phi, TOKENS[0]
    )
    with pytest.raises(RecipeError, match=r"train\.lora\.trainable_tokens with deepspeed zero3"):
        check_training(config(lora={"trainable_tokens": TOKENS}, deepspeed="zero3"))
    for key in ("modules_to_save", "target_modules"):
        lora = LoraConfig(trainable_tokens=TOKENS[:1], **{key: ("lm_head",)})
        with pytest.raises(RecipeError, match="lm_head is trained by modules_to_save or target_modules already"):
            check_adapter(tiny_model, lora)


@pytest.mark.slow
def test_a_converted_adapter_needs_the_rows_that_the_recipe_names(
    tiny_model: Path, tmp_path: Path, write_conversations: Callable[..., Path]
) -> None:
    packed = make_packed(tmp_path / "data", tiny_model, write_conversations)
    section = config(lora={"trainable_tokens": TOKENS}, max_steps=1)
    checkpoint = train_here(packed, tiny_model, tmp_path, section) / "checkpoint"
    options = ConvertOptions(base=tiny_model, tokenizer=packed / "tokenizer", dtype=None)
    with pytest.raises(ModelError, match="not a lora_A or lora_B weight"):
        convert_checkpoint(checkpoint, tmp_path / "a", config().lora, str(tiny_model), options)
    fewer = config(lora={"trainable_tokens": TOKENS[:1]}).lora
    with pytest.raises(ModelError, match=r"has shape \(2, 64\), on the base .* it is \(1, 64\)"):
        convert_checkpoint(checkpoint, tmp_path / "b", fewer, str(tiny_model), options)
    nowhere = ConvertOptions(base=None, tokenizer=packed / "tokenizer", dtype=None)
    with pytest.raises(ModelError, match="which rows these are is known by the base alone; give it"):
        convert_checkpoint(checkpoint, tmp_path / "c", section.lora, str(tiny_model), nowhere)
    convert_checkpoint(checkpoint, tmp_path / "d", section.lora, str(tiny_model), options)
    assert json.loads((tmp_path / "d" / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "embed_tokens": sorted(AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids(TOKENS)),
        "lm_head": sorted(AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids(TOKENS)),
    }
