"""The whole DAG on a real instruct model: it learns, speaks its own template, ends its answers, merges as trained."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.merge import MergeOptions, merge_adapter
from sft_core.pack import IGNORE_INDEX, load_packed
from tests.printed import unknown_lines
from tests.real.conftest import Retrained

IM_END = 2
"""SmolLM2's `<|im_end|>`."""
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
"""What its template writes where the row has no system message."""
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def test_exact_match_rises_from_nothing_and_the_version_is_champion(retrained: Retrained) -> None:
    scores = {which: retrained.manifest(f"evaluate/{which}").facts["metrics"] for which in ("base", "tuned")}
    assert scores["base"]["exact_match"] <= 0.05
    assert scores["tuned"]["exact_match"] >= 0.5
    assert scores["tuned"]["loss"] < scores["base"]["loss"] / 2
    version = retrained.client().get_model_version_by_alias("demo_real", "champion")
    assert str(version.version) == "1"
    assert version.tags["sft.verdict"].startswith("promoted: beats the base: exact_match")
    assert "demo_real version 1 (@candidate, @champion)" in retrained.printed
    assert "sft chat models:/demo_real@champion" in retrained.printed


def test_every_line_before_the_summary_is_of_a_known_form(retrained: Retrained) -> None:
    before, rule, _ = retrained.printed.partition("\u2500" * 20)
    assert rule
    assert "Finished in state Completed()" in before
    assert unknown_lines(before) == []


def test_rows_are_read_and_served_in_the_models_own_template(retrained: Retrained, real_model: Path) -> None:
    assert retrained.manifest("pack").facts["chat_template"] == "the tokenizer's own"
    template = (real_model / "chat_template.jinja").read_bytes()
    assert (retrained.artifact("merge") / "chat_template.jinja").read_bytes() == template
    assert (retrained.artifact("convert") / "chat_template.jinja").read_bytes() == template
    tokenizer, packed = AutoTokenizer.from_pretrained(real_model), load_packed(retrained.artifact("pack"))
    for number in range(20):
        sequence = packed.sequence(number)
        first = next(i for i, label in enumerate(sequence.labels) if label != IGNORE_INDEX)
        before = tokenizer.decode(sequence.input_ids[:first])
        ask = before.removeprefix(f"{SYSTEM}<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert before == f"{SYSTEM}<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
        served = tokenizer.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True)
        assert served["input_ids"] == sequence.input_ids[:first]
        assert IM_END in sequence.labels


def test_the_merged_model_is_the_trained_one_and_both_bases_were_tried(retrained: Retrained) -> None:
    certificate = retrained.manifest("merge").facts["certificate"]
    divergences = {name: figures["kl"] for name, figures in certificate["candidates"].items()}
    assert certificate["certified"]
    assert set(divergences) == {"dequantized", "full"}
    assert certificate["chosen"] == "dequantized"
    assert abs(divergences["dequantized"]) < 1e-3 < divergences["full"]  # the 4-bit base is what was trained
    assert certificate["tokens"] > 500


@pytest.mark.parametrize("base", ["full", "dequantized"])
def test_merging_into_either_base_is_the_sum(base: str, retrained: Retrained, real_model: Path, tmp_path: Path) -> None:
    adapter = retrained.artifact("convert")
    merge_adapter(real_model, adapter, tmp_path / "out", MergeOptions(base=base, compute_dtype="float32"))
    before, after = load_file(real_model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    scale = retrained.recipe.train.lora.lora_alpha / retrained.recipe.train.lora.r
    for module in (f"model.layers.{layer}.{name}" for layer in (0, 29) for name in PROJECTIONS):
        weight = before[f"{module}.weight"]
        if base == "dequantized":
            data, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            weight = bnb.functional.dequantize_4bit(data, state)
        up, down = (lora[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
        torch.testing.assert_close(after[f"{module}.weight"], (weight.double() + scale * up @ down).float())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_answers_end_by_themselves(retrained: Retrained) -> None:
    folder = retrained.artifact("merge")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] in (IM_END, [IM_END])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [messages for messages in heldout(retrained) if len(messages) == 2][:6]
    assert len(asked) == 6
    ended = 0
    for ask, answer in asked:
        prompt = tokenizer.apply_chat_template([ask], add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        ended += ids[-1] == IM_END and ids.index(IM_END) == len(tokenizer(answer["content"]).input_ids)
    assert ended >= 4  # they end, and where the right answer ends


def heldout(retrained: Retrained) -> list[list[dict[str, Any]]]:
    """Messages of the held-out rows."""
    files = sorted((retrained.artifact("normalize") / "heldout").glob("*.parquet"))
    rows = [row["messages"] for path in files for row in pq.read_table(path).to_pylist()]
    assert len(rows) >= 40
    return [[{"role": m["role"], "content": m["content"]} for m in messages] for messages in rows]
