"""A base whose tokenizer is larger than its embedding: given more rows, new tokens trained, converted, merged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.main import main
from sft_core.base_check import check_folder
from sft_core.base_check.vocabulary import Resized, resize
from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from tests.sft_core.train_runs import config, make_packed, train_here

BEFORE, AFTER = 259, 261
BOTH = ("embed_tokens", "lm_head")
TOKENS = ("say w", "!!")
METHODS: dict[str, dict[str, Any] | None] = {
    "rows": {"trainable_tokens": TOKENS},
    "modules": {"modules_to_save": BOTH},
    "full": None,
}


def add_tokens(model: Path, folder: Path, tied: bool = False) -> Path:
    """A copy of the model with two tokens more than rows; `w` stands in every row that is trained."""
    shutil.copytree(model, folder)
    if tied:
        loaded = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
        loaded.tie_weights()
        loaded.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TOKENS))
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if len(tensor) in (BEFORE, AFTER)}


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_and_nothing_else_changes(tied: bool, tiny_model: Path, tmp_path: Path) -> None:
    base = add_tokens(tiny_model, tmp_path / "base", tied)
    assert resize(base, tmp_path / "out") == Resized(BEFORE, AFTER, TOKENS)
    assert check_folder(tmp_path / "out", numbers=True) == ()
    before, after = rows_of(base), rows_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert len(after) == (1 if tied else 2)
    for name, rows in after.items():
        assert torch.equal(rows[:BEFORE], before[name])
        torch.testing.assert_close(rows[BEFORE:], before[name].mean(0).expand(2, -1))
    whole, resized = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], resized[name]) for name in whole.keys() - before.keys())
    assert whole.keys() == resized.keys()
    with pytest.raises(ModelError, match="its 261 rows are enough for its tokenizer; use it as it is"):
        resize(tmp_path / "out", tmp_path / "again")


def test_the_command_that_the_refusal_names_writes_a_base_that_is_accepted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = add_tokens(tiny_model, tmp_path / "base"), tmp_path / "out"
    with pytest.raises(ModelError, match=f"sft convert resize {base} OUT"):
        check_folder(base)
    monkeypatch.setattr("sys.argv", ["sft", "convert", "resize", str(base), str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out == (
        f"{out}: 261 token rows, 2 of them new: the mean of the others\n"
        f'to train them: base_model.path: {out}, train.lora.trainable_tokens: ["say w", "!!"]\n'
    )
    assert check_folder(out, numbers=True) == ()


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_trained_saved_converted_and_merged(
    tied: bool, method: str, tiny_model: Path, tmp_path: Path, write_conversations: Callable[..., Path]
) -> None:
    base = tmp_path / "resized"
    resize(add_tokens(tiny_model, tmp_path / "base", tied), base)
    packed = make_packed(tmp_path / "data", base, write_conversations)
    section = config(lora=METHODS[method], max_steps=3)
    checkpoint = train_here(packed, base, tmp_path, section) / "checkpoint"
    out = tmp_path / "converted"
    options = ConvertOptions(base=base, tokenizer=packed / "tokenizer", dtype=None)
    convert_checkpoint(checkpoint, out, section.lora, str(base), options)
    if section.lora is not None:
        merge_adapter(base, out, tmp_path / "merged", MergeOptions(base="full", quantization="none"))
        out = tmp_path / "merged"
    word = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("say w")
    assert word >= BEFORE
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, out))
    moved = after.get_input_embeddings().weight - before.get_input_embeddings().weight
    assert float(moved[word].detach().abs().max()) > 1e-3
    assert after.config.vocab_size == AFTER


def test_tokens_are_added_first_and_a_spare_row_is_taken_before_new_ones(tiny_model: Path, tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    shutil.copytree(tiny_model, spare)
    roomy = AutoModelForCausalLM.from_pretrained(spare)
    roomy.resize_token_embeddings(BEFORE + 1, mean_resizing=False)
    roomy.save_pretrained(spare)
    assert resize(spare, tmp_path / "one", ["<|call|>"]) == Resized(BEFORE + 1, BEFORE + 1, ("<|call|>",))
    made = resize(spare, tmp_path / "two", ["<|call|>", "<|result|>"])
    assert made == Resized(BEFORE + 1, BEFORE + 2, ("<|call|>", "<|result|>"))
    for folder, added in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        assert check_folder(folder, numbers=True) == ()
        tokenizer, before = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(spare)
        assert tokenizer("a<|call|>b", add_special_tokens=False).input_ids[1] == BEFORE
        assert tokenizer.decode([BEFORE], skip_special_tokens=True) == ""
        assert tokenizer("say w1 <|im_end|>\n").input_ids == before("say w1 <|im_end|>\n").input_ids
        kept, rows = load_file(spare / "model.safetensors"), load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(rows[name][:BEFORE], kept[name][:BEFORE])
            torch.testing.assert_close(rows[name][BEFORE:], kept[name][:BEFORE].mean(0).expand(added, -1))
    with pytest.raises(ModelError, match=r"has '<\|im_end\|>' already; train\.lora\.trainable_tokens trains its rows"):
        resize(spare, tmp_path / "three", ["<|im_end|>"])
    with pytest.raises(ModelError, match="a token is named twice"):
        resize(spare, tmp_path / "four", ["<|x|>", "<|x|>"])
