"""All weights trained: the folder must be what transformers itself would save, from every layout a trainer leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BASES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=list(BASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A live model, and a folder: `base` with the configuration and tokenizer, `saved` by transformers itself."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[request.param]())
    model.config.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder / "base")
    model.save_pretrained(folder / "saved")
    return model, folder


def convert(checkpoint: Path, folder: Path, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    convert_checkpoint(checkpoint, out, None, "some/base", ConvertOptions(base=folder / "base", **more))
    return {name: t for path in sorted(out.glob("model*.safetensors")) for name, t in load_file(path).items()}


def assert_as_saved(got: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> None:
    expected = load_file(folder / "saved" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.to(dtype)), name
        assert got[name].dtype == dtype


def as_xtuner(model: Any, path: Path, **changes: torch.Tensor) -> Path:
    """One file, every name of the live model behind `llm.`, tied weights under both names."""
    state = {f"llm.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"meta": {"iter": 4, "epoch": 0}, "state_dict": {**state, **changes}, "message_hub": {}}, path)
    return path


def as_zero3(model: Any, folder: Path, ranks: int = 3) -> Path:
    """XTuner's DeepSpeed folder: ceil(numel / ranks) elements of every parameter a rank, the last ones padding."""
    folder.mkdir()
    named = {f"llm.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    parts = []
    for tensor in named.values():
        each = -(-tensor.numel() // ranks)
        padded = torch.cat([tensor.reshape(-1), torch.full((each * ranks - tensor.numel(),), torch.nan)])
        parts.append(padded.view(ranks, each))
    shared = {}
    if model.config.tie_word_embeddings:
        shared = {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}
    for rank in range(ranks):
        optimizer = {
            "zero_stage": 3,
            "partition_count": ranks,
            "fp32_flat_groups": [torch.cat([part[rank] for part in parts])],
            "optimizer_state_dict": {"state": {0: {"step": 4}}},
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, folder / name)
        states = {
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in named},
            "buffer_names": [],
            "param_shapes": [{name: tensor.shape for name, tensor in named.items()}],
            "shared_params": shared,
            "frozen_param_shapes": None,
            "global_steps": 4,
        }
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


def test_xtuners_single_file(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    checkpoint = as_xtuner(model, tmp_path / "iter_4.pth")
    assert_as_saved(convert(checkpoint, folder, tmp_path / "out"), folder)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "some/base"' in card
    assert "checkpoint: xtuner-pth, 1 ranks, optimizer step 4" in card
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in model.state_dict().items())


def test_xtuners_zero3_folder(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    assert_as_saved(convert(as_zero3(model, tmp_path / "iter_4.pth"), folder, tmp_path / "out"), folder)


def test_a_checkpoint_in_published_names_cut_in_files(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    checkpoint = tmp_path / "checkpoint-4"
    model.save_pretrained(checkpoint, max_shard_size="8KB")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    got = convert(checkpoint, folder, tmp_path / "out", dtype="bfloat16", max_shard_size=4_000)
    assert_as_saved(got, folder, torch.bfloat16)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_incomplete_foreign_and_broken_weights_are_refused(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    name = "model.layers.1.self_attn.k_proj.weight"
    shape = model.state_dict()[name].shape
    cases = {
        "NaN or infinity": {f"llm.{name}": torch.full(shape, torch.nan)},
        "has shape": {f"llm.{name}": torch.ones(3, 3)},
        "is no weight of it": {"llm.model.layers.9.self_attn.k_proj.weight": torch.ones(shape)},
    }
    if model.config.tie_word_embeddings:
        cases["are tied in the base"] = {"llm.lm_head.weight": torch.ones(32, 16)}
    for says, changes in cases.items():
        with pytest.raises(ModelError, match=says):
            convert(as_xtuner(model, tmp_path / "iter_4.pth", **changes), folder, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.safetensors"))
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    saved = load_file(folder / "saved" / "model.safetensors")
    lost = next(key for key in saved if "layers.0" in key and ("experts" in key or "mlp.up_proj" in key))
    save_file({key: tensor for key, tensor in saved.items() if key != lost}, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match="is missing"):
        convert(checkpoint, folder, tmp_path / "out")
    with pytest.raises(ModelError, match="dtype 'int8': must be one of"):
        convert(as_xtuner(model, tmp_path / "iter_4.pth"), folder, tmp_path / "out", dtype="int8")
