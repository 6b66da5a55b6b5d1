"""`sft explain RECIPE --gpu NAME`: what it prints, where hours come from, and what it refuses."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from cli.console import SafeConsole
from cli.forecast import print_forecast
from sft_core.errors import ModelError, RecipeError
from sft_core.forecast import GPUS
from sft_core.recipe import resolve


@pytest.fixture
def printed(tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    def run(gpu: str = "h100", base: Path = tiny_model, **train: Any) -> str:
        recipe = resolve(
            {
                "name": "forecast",
                "store": str(tmp_path / "store"),
                "base_model": {"path": str(base)},
                "datasets": [{"path": "nowhere.jsonl", "map_fn": "oasst1"}],
                "pack": {"max_length": 128, "chat_template": "chatml"},
                "train": {"lora": {"r": 4}, "gradient_accumulation_steps": 8, **train},
            }
        )
        out = StringIO()
        print_forecast(SafeConsole(file=out, width=200), recipe, gpu)
        return out.getvalue()

    return run


def test_the_table_says_what_a_gpu_holds_and_sums_it_up(printed: Callable[..., str]) -> None:
    """No source is read: there is none."""
    lines = printed(max_steps=10).splitlines()
    held = ["4-bit weights", "other weights", "adapter", "gradients", "optimizer", "DeepSpeed's buckets"]
    held += ["CUDA and its libraries", "activations", "logits", "one layer's work", "peak"]
    assert [line[: len(name)] for line, name in zip(lines[1:], held, strict=False)] == held
    assert "of 85.5 GB" in lines[11]  # 81,559 MiB
    assert lines[12] == (
        "split: 1 packed row at once x 8, all layers recomputed: 8 packed rows of 128 tokens an optimizer step"
    )
    assert lines[13].startswith("speed: about ")
    assert "hours for 10,240 tokens (10 optimizer steps of full rows)" in lines[14]


def test_several_gpus_share_and_auto_chooses(printed: Callable[..., str]) -> None:
    said = printed("8xh100", per_device_train_batch_size="auto", gradient_checkpointing="auto")
    assert "no layer recomputed: 64 packed rows of 128 tokens an optimizer step" in said
    assert "speed: 8 GPUs: about" in said
    assert "for 100 million tokens (nothing was packed yet)" in said


def test_what_does_not_fit_is_an_error(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=2**29))
    with pytest.raises(RecipeError, match=r"does not fit NVIDIA H100 80GB: 0\.5 GB are free, 1 packed row at once x 8"):
        printed()


def test_unknown_names_are_errors(printed: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--gpu h1: not known; take one of b200"):
        printed("h1")
    with pytest.raises(ModelError, match=r"no config\.json"):
        printed(base=tmp_path)
