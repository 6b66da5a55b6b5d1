"""Template tokens that the base never learned are named; trained ones never are, nor any where nothing can be told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_core.errors import ModelError
from sft_core.outlook import UsedTokens, Vocabulary, untrained_tokens
from sft_core.outlook.training import read_vocabulary, untrained_words
from sft_core.recipe import LoraConfig, TrainConfig

SHARED = Path(__file__).parents[2].parent / "shared"
WORDS, WIDTH, PADDED = 600, 64, 8
START, END, OTHER, RESERVED = "<|im_start|>", "<|im_end|>", "<|other|>", "<|reserved_{}|>"
SPECIAL = [START, END, OTHER, *(RESERVED.format(i) for i in range(6))]
IDS = {token: WORDS + place for place, token in enumerate(SPECIAL)}
ROWS = WORDS + len(SPECIAL) + PADDED
USED = UsedTokens(frozenset({IDS[START], IDS[END]}), frozenset({IDS[END]}))
Change = Callable[[torch.Tensor], None]


VOCABULARY = Vocabulary({**{i: f"w{i}" for i in range(WORDS)}, **{i: token for token, i in IDS.items()}}, {})
VOCABULARY.added.update({i: token for token, i in IDS.items()})


def trained_rows(seed: int = 0) -> torch.Tensor:
    """Rows of a trained matrix: a direction in common, and one that a row shares with its neighbours; norms differ."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(WIDTH, generator=generator)
    groups = torch.randn(40, WIDTH, generator=generator)
    rows = common + 1.2 * groups[torch.arange(ROWS) % 40] + torch.randn(ROWS, WIDTH, generator=generator)
    return rows * (0.8 + 0.4 * torch.rand(ROWS, 1, generator=generator))


def base(folder: Path, change: Change, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder, as far as it is read: `change` is done to the output rows."""
    head, embeddings = trained_rows(), trained_rows(1)
    change(head)
    tensors = {"model.embed_tokens.weight": head if tied else embeddings, "model.norm.weight": torch.ones(WIDTH)}
    if not tied:
        tensors["lm_head.weight"] = head
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"tie_word_embeddings": tied, "initializer_range": 0.02, "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unused(rows: torch.Tensor) -> torch.Tensor:
    return rows[[*(IDS[RESERVED.format(i)] for i in range(6)), *range(ROWS - PADDED, ROWS)]]


def set_unused(rows: torch.Tensor, value: torch.Tensor) -> None:
    rows[IDS[RESERVED.format(0)] :] = value


def nothing(rows: torch.Tensor) -> None:
    """All rows are trained."""


def near_zero(rows: torch.Tensor) -> None:
    """Llama 3's way: reserved rows of next to nothing."""
    rows[IDS[END]] *= 1e-3


def as_another(rows: torch.Tensor) -> None:
    """Two tokens that were added and never met a text."""
    rows[IDS[END]] = rows[IDS[OTHER]] = 1.1 * rows[7]


def as_the_mean(rows: torch.Tensor) -> None:
    """How transformers begins the row of a token that is added."""
    rows[IDS[END]] = rows[:WORDS].mean(dim=0)


def as_the_unused(rows: torch.Tensor) -> None:
    """Never a target: all such rows were pushed the same way, each from its own beginning."""
    generator = torch.Generator().manual_seed(5)
    away = -2 * rows[:WORDS].mean(dim=0)
    count = ROWS - IDS[RESERVED.format(0)]
    set_unused(rows, away + 0.5 * torch.randn(count, WIDTH, generator=generator))
    rows[IDS[END]] = away + 0.5 * torch.randn(WIDTH, generator=generator)


UNTRAINED: list[tuple[Change, str]] = [
    (near_zero, "small"),
    (as_another, "equal"),
    (as_the_mean, "equal"),
    (as_the_unused, "alike"),
]


@pytest.mark.parametrize(("change", "sign"), UNTRAINED)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untrained_output_row_is_found_by_its_sign(
    tmp_path: Path, change: Change, sign: str, tied: bool, dtype: torch.dtype
) -> None:
    (found,) = untrained_tokens(base(tmp_path, change, tied, dtype), VOCABULARY, USED)
    assert (found.token, found.token_id, found.is_output, found.sign) == (END, IDS[END], True, sign)
    assert found.module == ("embed_tokens" if tied else "lm_head")
    assert found.typical == pytest.approx(float(trained_rows()[:WORDS].norm(dim=1).median()), rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_left_in_peace(tmp_path: Path, tied: bool) -> None:
    assert untrained_tokens(base(tmp_path, nothing, tied), VOCABULARY, USED) == []


def test_a_trained_token_beside_unused_ones_is_left_in_peace(tmp_path: Path) -> None:
    def only_the_unused(rows: torch.Tensor) -> None:
        own = rows[IDS[END]].clone()
        as_the_unused(rows)
        rows[IDS[END]] = own

    assert untrained_tokens(base(tmp_path, only_the_unused), VOCABULARY, USED) == []


def test_nothing_is_said_where_all_rows_look_alike(tmp_path: Path) -> None:
    def random(rows: torch.Tensor) -> None:
        rows[:] = 0.02 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))

    def equal(rows: torch.Tensor) -> None:
        rows[:] = rows[0].clone()

    for change in (random, equal):
        assert untrained_tokens(base(tmp_path, change), VOCABULARY, USED) == []


def test_a_fresh_row_is_known_by_where_it_began(tmp_path: Path) -> None:
    """Of a width where random rows are far from all others; its norm is an ordinary one."""
    generator = torch.Generator().manual_seed(0)
    wide = 1024
    groups = torch.randn(40, wide, generator=generator)
    rows = groups[torch.arange(ROWS) % 40] + torch.randn(ROWS, wide, generator=generator)
    rows[IDS[END]] = torch.randn(wide, generator=generator) * rows.norm(dim=1).median() / wide**0.5
    save_file(
        {"lm_head.weight": rows, "model.embed_tokens.weight": rows[:, :WIDTH].clone()}, tmp_path / "model.safetensors"
    )
    scale = float(rows.norm(dim=1).median()) / wide**0.5
    (tmp_path / "config.json").write_text(json.dumps({"initializer_range": scale, "tie_word_embeddings": False}))
    found = untrained_tokens(tmp_path, VOCABULARY, UsedTokens(frozenset(), frozenset(IDS[t] for t in (START, END))))
    assert [(token.token, token.sign) for token in found] == [(END, "as begun")]


def test_rows_are_found_in_shards_and_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    whole = base(tmp_path, near_zero)
    (whole / "model.safetensors").rename(whole / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [token.token for token in untrained_tokens(whole, VOCABULARY, USED)] == [END]
    (whole / "model.safetensors.index.json").unlink()
    assert untrained_tokens(whole, VOCABULARY, USED) == []


def test_torn_weights_are_an_error_before_training(tmp_path: Path) -> None:
    folder = base(tmp_path, nothing)
    weights = (folder / "model.safetensors").read_bytes()
    for torn, words in (
        (weights[: len(weights) // 2], "is not whole; fetch the base model"),
        (weights[:50], "not a safe"),
    ):
        (folder / "model.safetensors").write_bytes(torn)
        with pytest.raises(ModelError, match=words):
            untrained_tokens(folder, VOCABULARY, UsedTokens(USED.read, USED.read))


def test_a_real_model_names_the_token_it_never_saw(tmp_path: Path) -> None:
    """stories260K never met `</s>`: its row is that of `<unk>`, to the sixth digit. `<s>` begins every story."""
    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"no {folder}: this test wants the small real model of the project's shared folder")
    used = UsedTokens(frozenset({0, 1, 2}), frozenset({1, 2}))
    shutil.copytree(folder, tmp_path / "tokenizer")
    found = untrained_tokens(folder, read_vocabulary(tmp_path), used)
    assert [(token.token, token.sign) for token in found] == [("</s>", "equal")]


def words(folder: Path, lora: LoraConfig | None, deepspeed: str | None = "zero2") -> list[str]:
    return untrained_words(TrainConfig(lora=lora, deepspeed=deepspeed, quantization="none"), folder, VOCABULARY, USED)


def test_the_warning_names_tokens_norms_and_the_key(tmp_path: Path) -> None:
    (said,) = words(base(tmp_path, near_zero), LoraConfig())
    assert "<|im_end|> (row of lm_head: norm 0.0" in said
    assert ", typical " in said
    assert said.endswith('set train.lora.trainable_tokens: ["<|im_end|>"]')
    (said,) = words(base(tmp_path, near_zero, tied=True), LoraConfig())
    assert "row of embed_tokens" in said
    assert said.endswith('set train.lora.trainable_tokens: ["<|im_end|>"]')


def test_the_key_is_one_that_training_takes(tmp_path: Path) -> None:
    whole = "set train.lora.modules_to_save: [embed_tokens, lm_head]"
    (said,) = words(base(tmp_path, near_zero), LoraConfig(), deepspeed="zero3")
    assert said.endswith(whole)
    folder = base(tmp_path, near_zero)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.bias": tensors["lm_head.weight"][:, 0].contiguous()}, folder / "model.safetensors")
    (said,) = words(folder, LoraConfig())
    assert said.endswith(whole)


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraConfig(modules_to_save=("embed_tokens", "lm_head")),
        LoraConfig(modules_to_save=("lm_head",)),
        LoraConfig(trainable_tokens=("<|im_end|>",)),
        LoraConfig(target_modules=("q_proj", "lm_head")),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_anyway_needs_no_warning(tmp_path: Path, lora: LoraConfig | None, tied: bool) -> None:
    assert words(base(tmp_path, near_zero, tied), lora) == []


def test_an_untrained_input_row_is_another_warning(tmp_path: Path) -> None:
    folder = base(tmp_path, nothing)
    rows = trained_rows(1)
    rows[IDS[START]] *= 1e-3
    save_file({"model.embed_tokens.weight": rows, "lm_head.weight": trained_rows()}, folder / "model.safetensors")
    (said,) = words(folder, LoraConfig())
    assert said.startswith("the base model never read <|im_start|> (row of embed_tokens: norm ")
    assert said.endswith('set train.lora.trainable_tokens: ["<|im_start|>"]')
