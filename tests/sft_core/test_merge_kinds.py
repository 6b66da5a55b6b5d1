"""Every kind of adapter on every kind of base: the folder must compute what PEFT's own merge computes, in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter

FULL = MergeOptions(base="full")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
BASES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied-llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma": lambda: GemmaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
}
TIED = ("tied-llama", "gpt2", "gemma")
PARTED = ("embedding", "dora-embedding", "head")
EMBEDDINGS = {"gpt2": "wte"}
QUERIES = {"gpt2": "c_attn"}
KINDS: dict[str, Any] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-both": {"modules_to_save": ["lm_head", "EMBEDDING"]},
    "saved-norm": {"modules_to_save": ["norm", "ln_f"]},
    "embedding": {"target_modules": ["EMBEDDING", "QUERY"]},
    "dora-embedding": {"target_modules": ["EMBEDDING", "QUERY"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "QUERY"]},
    "patterns": {"rank_pattern": {"QUERY": 2}, "alpha_pattern": {"layers.1": 3, "h.1": 3}},
}


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{chr(97 + i): i + 3 for i in range(26)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_base(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[family]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=list(BASES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_base(request.param, tmp_path_factory.mktemp(request.param))


def settings_of(kind: str, family: str) -> dict[str, Any]:
    text = json.dumps(KINDS[kind]).replace("EMBEDDING", EMBEDDINGS.get(family, "embed_tokens"))
    targets = ["q_proj", "v_proj", "o_proj"] if family == "mixtral" else "all-linear"
    return {"target_modules": targets, **json.loads(text.replace("QUERY", QUERIES.get(family, "q_proj")))}


def write_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """PEFT's own adapter, every trained parameter moved."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 29, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(ids).logits
    return result


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_folder_computes_what_pefts_merge_computes(family: tuple[str, Path], kind: str, tmp_path: Path) -> None:
    name, base = family
    adapter = write_adapter(base, tmp_path / "adapter", **settings_of(kind, name))
    outcome = merge_adapter(base, adapter, tmp_path / "out", FULL)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    trained = logits(live)
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-5)
    if name not in TIED or kind not in PARTED:  # there PEFT adds the update of one name to the weight of both
        torch.testing.assert_close(ours, logits(live.merge_and_unload()), rtol=1e-4, atol=1e-5)
    assert outcome.facts["merged_by"] == "a stream over the base's files"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = {key: tensor for path in files for key, tensor in load_file(path).items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert set(index["weight_map"]) == set(stored)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bias": "all"}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("gpt2", {"lora_bias": True}),
        ("mixtral", {}),
        ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    ],
)
def test_what_the_stream_cannot_do_goes_through_peft_and_says_so(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    base = write_base(name, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", **{"target_modules": "all-linear", **settings})
    outcome = merge_adapter(base, adapter, tmp_path / "out", FULL)
    assert outcome.facts["merged_by"].startswith("PEFT's merge_and_unload in fp32 (")
    assert "PEFT's merge_and_unload" in (tmp_path / "out" / "README.md").read_text()
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(ours, logits(live), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="only into the full base"):
        merge_adapter(base, adapter, tmp_path / "nf4", MergeOptions(base="dequantized"))


def test_what_was_tied_in_training_stays_tied(tmp_path: Path) -> None:
    base = write_base("tied-llama", tmp_path / "base")
    tied: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **tied)
    merge_adapter(base, adapter, tmp_path / "out", FULL)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(live), rtol=1e-4, atol=1e-5)


def test_a_model_of_more_layers_than_the_base_is_refused(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(ModelError, match="layer_replication is set"):
        merge_adapter(base, adapter, tmp_path / "out", FULL)


def test_an_untouched_tie_stays_and_a_changed_one_is_parted(tmp_path: Path) -> None:
    base = write_base("tied-llama", tmp_path / "base")
    for kind, tied in (("lora", True), ("saved-head", False), ("embedding", False)):
        adapter = write_adapter(base, tmp_path / f"{kind}-adapter", **settings_of(kind, "llama"))
        merge_adapter(base, adapter, tmp_path / kind, FULL)
        assert json.loads((tmp_path / kind / "config.json").read_text())["tie_word_embeddings"] is tied
        stored = [key for path in (tmp_path / kind).glob("*.safetensors") for key in load_file(path)]
        assert ("lm_head.weight" in stored) is not tied


def test_a_base_in_bin_files_gives_the_same_weights(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merge_adapter(base, adapter, tmp_path / "expected", FULL)
    index = {"metadata": {}, "weight_map": {}}
    for path in sorted(base.glob("*.safetensors")):
        name = path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_file(path), base / name)
        index["weight_map"].update(dict.fromkeys(load_file(path), name))
        path.unlink()
    (base / "model.safetensors.index.json").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    merge_adapter(base, adapter, tmp_path / "out", FULL)
    for path in (tmp_path / "expected").glob("*.safetensors"):
        expected, got = load_file(path), load_file(tmp_path / "out" / path.name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_max_shard_size_cuts_the_files_anew(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merge_adapter(base, adapter, tmp_path / "whole", MergeOptions(base="full", max_shard_size=10**9))
    merge_adapter(base, adapter, tmp_path / "cut", MergeOptions(base="full", max_shard_size=20_000))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(files) > 3
    cut = {key: tensor for path in files for key, tensor in load_file(path).items()}
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 20_000 for path in files)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_base_with_a_missing_or_torn_shard_is_refused(tmp_path: Path, damage: str) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(content[:-8])
    what = f"names {shard.name}, which is not there" if damage == "missing" else f"{shard.name}: missing or torn"
    with pytest.raises(ModelError, match=what):
        merge_adapter(base, adapter, tmp_path / "out", FULL)
