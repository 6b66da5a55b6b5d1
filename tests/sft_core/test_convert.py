"""Checkpoints to adapters: XTuner's real ones, plain Trainer folders, and those that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

ROOT = Path(__file__).parents[2]
XTUNER = ROOT.parent / "shared" / "checkpoints" / "xtuner"
LORA = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0)
A, B = "base_model.model.model.layers.0.mlp.up_proj.lora_A", "base_model.model.model.layers.0.mlp.up_proj.lora_B"

needs_xtuner = pytest.mark.skipif(not XTUNER.is_dir(), reason=f"XTuner's checkpoints are not at {XTUNER}")


def convert(checkpoint: Path, out: Path, lora: LoraConfig = LORA, **more: Any) -> dict[str, torch.Tensor]:
    convert_checkpoint(checkpoint, out, lora, "base", ConvertOptions(**more))
    return load_file(out / "adapter_model.safetensors")


def assert_bitwise_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def tiny(**changes: Any) -> dict[str, torch.Tensor]:
    """One module's pair under XTuner's names, trained in the sense that B is not zero."""
    tensors = {f"llm.{A}.default.weight": torch.randn(3, 8), f"llm.{B}.default.weight": torch.ones(4, 3)}
    return {**tensors, **changes}


def save_pth(path: Path, state_dict: Any) -> Path:
    torch.save({"meta": {"iter": 7}, "state_dict": state_dict}, path)
    return path


# --- XTuner's real checkpoints ---


@needs_xtuner
@pytest.mark.parametrize(
    ("run", "layout", "ranks"), [("lora/iter_4.pth", "xtuner-pth", 1), ("lora_ds2/iter_4.pth", "deepspeed-zero2", 2)]
)
def test_xtuner_masters_are_kept_bit_for_bit(tmp_path: Path, run: str, layout: str, ranks: int) -> None:
    name = run.partition("/")[0]
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0)
    outcome = convert_checkpoint(XTUNER / run, tmp_path, lora, "base", ConvertOptions(base=XTUNER / "base"))
    expected = load_file(XTUNER / "expected" / f"{name}.fp32.safetensors")
    assert_bitwise_equal(load_file(tmp_path / "adapter_model.safetensors"), expected)
    assert outcome.facts["norm_b"] == pytest.approx(
        sum(float(t.double().norm() ** 2) for n, t in expected.items() if "lora_B" in n) ** 0.5
    )
    assert {k: outcome.facts[k] for k in ("tensors", "parameters", "layout", "ranks", "global_steps")} == {
        "tensors": 28,
        "parameters": 1856,
        "layout": layout,
        "ranks": ranks,
        "global_steps": 4,
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((XTUNER / "expected" / f"{name}.adapter_config.json").read_text())
    assert config["target_modules"] == sorted(theirs.pop("target_modules"))
    assert {key: config[key] for key in theirs if key in config} == {k: v for k, v in theirs.items() if k in config}


@needs_xtuner
def test_links_are_followed(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0)
    shards, base = tmp_path / "shards.pth", tmp_path / "base"
    for folder, source in ((shards, XTUNER / "lora_ds2" / "iter_4.pth"), (base, XTUNER / "base")):
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)  # as in a snapshot of the hub's cache
    (tmp_path / "last.pth").symlink_to(XTUNER / "lora" / "iter_4.pth")
    for name, checkpoint in (("lora", tmp_path / "last.pth"), ("lora_ds2", shards)):
        convert_checkpoint(checkpoint, tmp_path / name, lora, "base", ConvertOptions(base=base))
        expected = load_file(XTUNER / "expected" / f"{name}.fp32.safetensors")
        assert_bitwise_equal(load_file(tmp_path / name / "adapter_model.safetensors"), expected)
    (gone,) = shards.glob("*rank_1*_optim_states.pt")
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=f"{gone.name}: no such file; the checkpoint is incomplete"):
        convert_checkpoint(shards, tmp_path / "out", lora, "base", ConvertOptions(base=base))


# --- plain Trainer folders, and folders around checkpoints ---


def test_plain_trainer_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    tensors = {f"{A}.weight": torch.randn(3, 8).bfloat16(), f"{B}.weight": torch.ones(4, 3).bfloat16()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text("template")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    assert_bitwise_equal(convert(tmp_path / "run", tmp_path / "newest"), tensors)
    assert_bitwise_equal(convert(checkpoint, tmp_path / "out"), tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    with pytest.raises(ModelError, match=r"lora_alpha is 6, train\.lora\.lora_alpha is 7"):
        convert(checkpoint, tmp_path / "out", LoraConfig(r=3, lora_alpha=7))


def test_tokenizer_comes_from_beside_the_checkpoint_or_from_where_one_says(tmp_path: Path) -> None:
    checkpoint = save_pth(tmp_path / "iter_7.pth", tiny())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("beside")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("other")
    convert(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "beside"
    convert(checkpoint, tmp_path / "out", tokenizer=tmp_path / "other")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "other"
    with pytest.raises(ModelError, match="no tokenizer there"):
        convert(checkpoint, tmp_path / "out", tokenizer=tmp_path)


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path) -> None:
    tensors = tiny()
    first = save_pth(tmp_path / "a.pth", tensors)
    second = save_pth(tmp_path / "b.pth", dict(reversed(tensors.items())))
    for checkpoint, out in ((first, "a"), (second, "b")):
        convert(checkpoint, tmp_path / out)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dtype_rounds_once(tmp_path: Path) -> None:
    tensors = tiny()
    got = convert(save_pth(tmp_path / "iter_7.pth", tensors), tmp_path / "out", dtype="bfloat16")
    assert torch.equal(got[f"{A}.weight"], tensors[f"llm.{A}.default.weight"].bfloat16())
    big = save_pth(tmp_path / "big.pth", tiny(**{f"llm.{B}.default.weight": torch.full((4, 3), 1e6)}))
    with pytest.raises(ModelError, match="infinity"):
        convert(big, tmp_path / "out", dtype="float16")


# --- refused ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"llm.{B}.default.weight": torch.full((4, 3), torch.nan)}, "lora_B.weight holds NaN"),
        ({f"llm.{A}.default.weight": torch.full((3, 8), torch.inf)}, "lora_A.weight holds NaN or infinity"),
        ({f"llm.{B}.default.weight": torch.zeros(4, 3)}, "every lora_B is zero"),
        ({f"llm.{B}.default.weight": torch.ones(4, 2)}, r"shape \(4, 2\), which is not of rank train.lora.r = 3"),
        ({"llm.base_model.model.x.lora_A.default.weight": torch.ones(3, 8)}, "x.lora_B.weight is missing"),
        ({f"{A}.default.weight": torch.ones(3, 8)}, "and another tensor are both"),
        ({"llm.model.layers.0.mlp.up_proj.weight": torch.ones(3)}, "not a lora_A or lora_B weight"),
    ],
)
def test_incomplete_or_untrained_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    checkpoint = save_pth(tmp_path / "iter_7.pth", tiny(**changes))
    with pytest.raises(ModelError, match=says):
        convert(checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = save_pth(tmp_path / "whole.pth", tiny()).read_bytes()
    for number, content in enumerate((whole[:-1], whole[: len(whole) // 2], b"", b"not a zip file at all")):
        path = tmp_path / f"torn{number}.pth"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"torn{number}.pth: torn"):
            convert(path, tmp_path / "out")
    with pytest.raises(ModelError, match="no such file or folder"):
        convert(tmp_path / "absent.pth", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither DeepSpeed's files"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ModelError, match="holds no adapter tensors"):
        convert(save_pth(tmp_path / "nothing.pth", {}), tmp_path / "out")
    shared = {f"llm.{name.replace('.0.', f'.{i}.')}": x for i in range(99) for name, x in tiny().items()}
    again = dict.fromkeys(shared, torch.ones(3, 99))
    with pytest.raises(ModelError, match="the same numbers many times over"):
        convert(save_pth(tmp_path / "grows.pth", again), tmp_path / "out")
    within: dict[str, Any] = {"meta": {"iter": 7}}
    within["state_dict"] = within
    torch.save(within, tmp_path / "within.pth")
    with pytest.raises(ModelError, match="state_dict holds meta, which is no tensor"):
        convert(tmp_path / "within.pth", tmp_path / "out")


# --- against the base's configuration ---


@needs_xtuner
def test_an_adapter_must_be_what_peft_makes_for_the_base(tmp_path: Path) -> None:
    tensors = load_file(XTUNER / "expected" / "lora.fp32.safetensors")
    options = ConvertOptions(base=XTUNER / "base")
    lora = LoraConfig(r=4, lora_alpha=16)

    def checkpoint(state: dict[str, torch.Tensor]) -> Path:
        return save_pth(tmp_path / "iter_7.pth", {f"llm.{name}": tensor for name, tensor in state.items()})

    convert_checkpoint(checkpoint(tensors), tmp_path / "whole", lora, "base", options)
    half = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.lora_A.weight is missing \(2 missing, 0 too many"):
        convert_checkpoint(checkpoint(half), tmp_path / "half", lora, "base", options)
    name = next(name for name in tensors if "layers.0.mlp.up_proj.lora_A" in name)
    wide = {**tensors, name: torch.ones(4, tensors[name].shape[1] + 1)}
    with pytest.raises(ModelError, match="layers.0.mlp.up_proj.lora_A.weight has shape .* trained on another model"):
        convert_checkpoint(checkpoint(wide), tmp_path / "wide", lora, "base", options)
    narrow = LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj",))
    with pytest.raises(ModelError, match="fits no target module"):
        convert_checkpoint(checkpoint(tensors), tmp_path / "narrow", narrow, "base", options)
