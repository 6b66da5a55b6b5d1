"""Adapters of other programs: added tokens, single trained tokens, `.bin` files. Merged rightly, or one clear line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from tests.sft_core.test_merge_kinds import logits, write_base

FULL = MergeOptions(base="full")
ROWS = 52
"""Of the resized vocabulary; the bases have 48."""
ATTENTION = ["q_proj", "v_proj"]
BOTH = ["embed_tokens", "lm_head"]
PEFT_MERGES = "PEFT's merge_and_unload in fp32 ("
RESIZED = f"{PEFT_MERGES}a vocabulary of {ROWS} rows)"
STREAM = "a stream over the base's files"
# Added tokens or not, PEFT's settings, who merges.
ODD: dict[str, tuple[bool, dict[str, Any], str]] = {
    "resized, nothing of it trained": (True, {}, RESIZED),
    "resized, both saved": (True, {"modules_to_save": BOTH}, RESIZED),
    "resized, embeddings saved": (True, {"modules_to_save": ["embed_tokens"]}, RESIZED),
    "resized, both by LoRA": (True, {"target_modules": [*ATTENTION, *BOTH]}, RESIZED),
    "resized, new tokens trained": (
        True,
        {"trainable_token_indices": {"embed_tokens": [48, 49]}},
        f"{PEFT_MERGES}trainable_token_indices = {{'embed_tokens': [48, 49]}}, a vocabulary of {ROWS} rows)",
    ),
    "old tokens trained": (False, {"trainable_token_indices": [3, 5]}, STREAM),
    "old tokens trained, others by LoRA": (
        False,
        {"trainable_token_indices": {"embed_tokens": [5, 3]}, "target_modules": [*ATTENTION, "lm_head"]},
        STREAM,
    ),
    "plain": (False, {}, STREAM),
}
REFUSED = ("tied-llama", "resized, both by LoRA")
TIED_TWICE = ("tied-llama", "old tokens trained, others by LoRA")


def save(base: Path, folder: Path, *, resized: bool, settings: dict[str, Any], **saving: Any) -> Any:
    """The trained model; its adapter in `folder`."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resized:
        model.resize_token_embeddings(ROWS)
    section = {"target_modules": ATTENTION, **settings}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **section))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder, **saving)
    return model


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.parametrize("family", ["llama", "tied-llama"])
def test_the_merged_folder_computes_what_was_trained(family: str, kind: str, safetensors: bool, tmp_path: Path) -> None:
    if (family, kind) in (REFUSED, TIED_TWICE):
        pytest.skip("refused, in a test of its own")
    resized, settings, by = ODD[kind]
    base = write_base(family, tmp_path / "base")
    model = save(base, tmp_path / "adapter", resized=resized, settings=settings, safe_serialization=safetensors)
    assert (tmp_path / "adapter" / f"adapter_model.{'safetensors' if safetensors else 'bin'}").is_file()
    outcome = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", FULL)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == (ROWS if resized else 48)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert outcome.facts["merged_by"] == by


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as error:
        merge_adapter(base, adapter, adapter.parent / "out", FULL)
    return str(error.value)


def test_low_rank_updates_of_a_resized_tied_embedding_need_the_resized_base(tmp_path: Path) -> None:
    base = write_base(REFUSED[0], tmp_path / "base")
    adapter = tmp_path / "adapter"
    model = save(base, adapter, resized=True, settings=ODD[REFUSED[1]][1])
    assert refusal(base, adapter) == (
        f"{adapter}/adapter_model.safetensors: has a low-rank update of model.embed_tokens, whose weight the base ties "
        "to another; together with the adapter's other settings PEFT cannot merge that rightly. If tokens were added, "
        "resize the base as in training (resize_token_embeddings, save_pretrained) and give that one"
    )
    shutil.copytree(base, tmp_path / "resized")
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(ROWS)
    with torch.no_grad():  # its new rows are drawn, as those of the training were
        held = load_file(adapter / "adapter_model.safetensors")
        resized.get_input_embeddings().weight.copy_(held["base_model.model.model.embed_tokens.base_layer.weight"])
    for path in (tmp_path / "resized").glob("model*"):
        path.unlink()
    resized.save_pretrained(tmp_path / "resized")
    merge_adapter(tmp_path / "resized", adapter, tmp_path / "out", FULL)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_rows_of_a_tied_embedding_beside_a_low_rank_update_of_it_are_refused(tmp_path: Path) -> None:
    base = write_base(TIED_TWICE[0], tmp_path / "base")
    save(base, tmp_path / "adapter", resized=False, settings=ODD[TIED_TWICE[1]][1])
    assert "has a low-rank update of lm_head, whose weight the base ties to another" in refusal(
        base, tmp_path / "adapter"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, rows: (name, rows[:1]), "has 1 rows, and trainable_token_indices is"),
        (lambda name, rows: (name.replace("embed_tokens", "lm_head"), rows), "has 2 rows, and trainable_token_indices"),
        (lambda name, rows: (name, rows * float("nan")), "holds NaN or infinity"),
        (lambda name, rows: (name, rows[:, :-1]), "the adapter was trained on another model"),
        (lambda name, rows: ("base_model.model.x.lora_A.weight", rows), "and no such rows are in it"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    save(base, tmp_path / "adapter", resized=False, settings={"trainable_token_indices": {"embed_tokens": [5, 3]}})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if "trainable_tokens_delta" in name)
    key, rows = change(name, tensors.pop(name))
    save_file({**tensors, key: rows.contiguous()}, file)
    assert said in refusal(base, tmp_path / "adapter")


def test_rows_that_the_adapter_does_not_hold_are_not_made_up(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    settings = {"modules_to_save": ["embed_tokens"]}
    save(base, tmp_path / "adapter", resized=True, settings=settings, save_embedding_layers=False)
    assert refusal(base, tmp_path / "adapter") == (
        f"{tmp_path}/adapter/adapter_model.safetensors: was trained with {ROWS} token rows, the base has 48, and the "
        "rows of lm_head are not in the adapter; save it with save_embedding_layers=True, or give the resized base"
    )


def test_two_sizes_are_no_vocabulary(tmp_path: Path) -> None:
    base, adapter = write_base("llama", tmp_path / "base"), tmp_path / "adapter"
    save(base, adapter, resized=True, settings={})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.ones(50, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "has 50 token rows, base_model.model.model.embed_tokens.weight 52" in refusal(base, adapter)


def test_a_bin_file_is_read_as_data_alone(tmp_path: Path) -> None:
    base, adapter = write_base("llama", tmp_path / "base"), tmp_path / "adapter"
    save(base, adapter, resized=False, settings={}, safe_serialization=False)
    torch.save({"a": 1}, adapter / "adapter_model.bin")
    path = adapter / "adapter_model.bin"
    assert refusal(base, adapter) == f"{path}: a is no tensor; save the adapter as safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path}: torn, or not a zip file of torch.save" in refusal(base, adapter)
    path.unlink()
    assert f"{adapter}/adapter_model.safetensors: missing or torn" in refusal(base, adapter)
