"""What can be trained: each method starts where it must, moves what it must, and leaves the rest alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_core.train.model import load_trainable
from tests.sft_core.train_runs import config, losses, train_here, train_together, weights

LAYERS = [
    f"base_model.model.model.layers.{layer}.{module}"
    for layer in (0, 1)
    for module in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gaussian": {"lora": {"init_lora_weights": "gaussian"}},
    "rslora": {"lora": {"use_rslora": True}},
    "dora": {"lora": {"use_dora": True}},
    "qlora": {"quantization": "nf4"},
    "qlora, dora": {"quantization": "nf4", "lora": {"use_dora": True}},
    "modules_to_save": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "whole model": {"lora": None},
}
UNDER_ZERO = ("lora", "qlora", "modules_to_save", "whole model")


def trainable(model: Path, **changes: Any) -> Any:
    """The model as training builds it."""
    torch.manual_seed(0)
    return load_trainable(model, config(**changes), trust_remote_code=False)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_exactly_its_parameters_in_float32(method: str, tiny_model: Path) -> None:
    model = trainable(tiny_model, dtype="bfloat16", **METHODS[method])
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    suffixes = ["lora_A.default.weight", "lora_B.default.weight"]
    if "dora" in method and method != "rslora":
        suffixes.append("lora_magnitude_vector.default.weight")
    expected = {f"{layer}.{suffix}" for layer in LAYERS for suffix in suffixes}
    if method == "modules_to_save":
        saved = ("model.embed_tokens", "lm_head")
        expected |= {f"base_model.model.{name}.modules_to_save.default.weight" for name in saved}
    if method == "whole model":
        expected = set(load_file(tiny_model / "model.safetensors"))
    assert set(parameters) == expected
    assert {value.dtype for value in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "whole model"])
def test_an_untrained_adapter_changes_nothing(method: str, tiny_model: Path) -> None:
    tokens = torch.arange(3, 20).unsqueeze(0)
    model = trainable(tiny_model, **METHODS[method]).train()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, base, rtol=0, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    for changes, expected in (({}, 8 / 4), ({"use_rslora": True}, 8 / 4**0.5)):
        model = trainable(tiny_model, lora=changes)
        module = model.get_submodule(LAYERS[0])
        assert module.scaling["default"] == expected


@pytest.mark.slow
def test_a_module_trained_whole_moves_and_what_is_not_named_does_not(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    section = config(quantization="nf4", lora={"modules_to_save": ["lm_head"], "use_rslora": True}, max_steps=3)
    saved = weights(train_here(packed, tiny_model, tmp_path, section))
    head = saved.pop("base_model.model.lm_head.weight")
    assert not torch.equal(head, load_file(tiny_model / "model.safetensors")["lm_head.weight"])
    sides = ("lora_A", "lora_B")
    assert set(saved) == {f"{layer}.{side}.weight" for layer in LAYERS for side in sides}
    assert all(bool(saved[f"{layer}.lora_B.weight"].any()) for layer in LAYERS)


@pytest.fixture(scope="module")
def under_zero(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`METHOD, STAGE` in bfloat16, all in one process."""
    sections = {
        f"{method}, {stage}": config(**METHODS[method], dtype="bfloat16", max_steps=3, deepspeed=stage)
        for method in UNDER_ZERO
        for stage in ("zero2", "zero3")
    }
    return train_together(packed, tiny_model, tmp_path_factory.mktemp("zero"), sections)


@pytest.mark.slow
@pytest.mark.parametrize("method", UNDER_ZERO)
def test_zero3_in_bfloat16_trains_as_zero2_does(method: str, under_zero: dict[str, Path], tiny_model: Path) -> None:
    two, three = (under_zero[f"{method}, {stage}"] for stage in ("zero2", "zero3"))
    assert losses(three) == pytest.approx(losses(two), abs=5e-3)  # rounding to 8 bits; a step moves the loss by 0.1
    assert losses(two)[2] < losses(two)[0] - 0.05
    if method == "whole model":
        check_all_moved(tiny_model, two)


def check_all_moved(model: Path, out: Path) -> None:
    before, after = load_file(model / "model.safetensors"), weights(out)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name].to(after[name].dtype), after[name]) for name in before)


@pytest.mark.slow
def test_all_weights_are_trained_in_float32_too(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = train_here(packed, tiny_model, tmp_path, config(lora=None, max_steps=4))
    check_all_moved(tiny_model, out)
    assert losses(out)[-1] < losses(out)[0]


@pytest.mark.slow
def test_neftune_noise_is_there_in_training_and_the_same_for_the_same_seed(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    quiet, noisy, again = (
        train_here(packed, tiny_model, tmp_path / name, config(max_steps=2, neftune_noise_alpha=alpha))
        for name, alpha in (("quiet", None), ("noisy", 10.0), ("again", 10.0))
    )
    assert losses(noisy) == losses(again)
    assert all(abs(one - other) > 1e-4 for one, other in zip(losses(noisy), losses(quiet), strict=True))
