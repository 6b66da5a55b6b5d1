"""A base that is not whole is refused when it is described: by plan, rehearsal, train and merge, in the same words."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cli.main import main
from sft_core.base_check import check_folder
from sft_core.base_check.generation import saveable
from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.plan import plan_recipe
from sft_core.recipe import Recipe, TrainConfig, resolve
from sft_core.rehearse import prepare_rehearsal
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.model import load_base
from tests.hub_server import hub
from tests.sft_core.architectures import SMALL
from tests.sft_core.train_runs import config, train, train_here

ROOT = Path(__file__).parents[2]
Q = "model.layers.1.self_attn.q_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "Fetch the base model again, or take a config.json and weights that were saved together"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def edit_json(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q][3, 5] = value

    return lambda folder: edit(folder, change)


def sharded(folder: Path, lost_file: bool = False, lost_tensor: bool = False) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    parts = {"model-00001-of-00002.safetensors": [Q], "model-00002-of-00002.safetensors": sorted(set(tensors) - {Q})}
    for name, held in parts.items():
        kept = held[1:] if lost_tensor and len(held) > 1 else held
        save_file({key: tensors[key] for key in kept}, folder / name)
    weight_map = {key: name for name, held in parts.items() for key in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if lost_file:
        (folder / "model-00001-of-00002.safetensors").unlink()


def as_bin_without(folder: Path, name: str) -> None:
    tensors = load_file(folder / FILE)
    del tensors[name]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


# What is broken, how, and the whole message; BASE is the folder.
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight is missing": (
        lambda folder: edit(folder, lambda tensors: tensors.pop(Q)),
        f"base model BASE: its files lack {Q} of the 21 weights of LlamaForCausalLM, which would begin as random "
        f"numbers. {AGAIN}",
    ),
    "a weight has another name": (
        lambda folder: edit(folder, lambda tensors: tensors.update({"head.weight": tensors.pop("lm_head.weight")})),
        "base model BASE: its files lack lm_head.weight of the 21 weights of LlamaForCausalLM, which would begin as "
        f"random numbers. They hold head.weight, for which it has no place. {AGAIN}",
    ),
    "a weight has another shape": (
        lambda folder: edit(folder, lambda tensors: tensors.update({Q: torch.ones(64, 65)})),
        f"base model BASE: {Q} has the shape (64, 65) in the files, and (64, 64) by config.json (LlamaForCausalLM). "
        f"{AGAIN}",
    ),
    "config.json has more layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=3),
        "base model BASE: its files lack model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight "
        f"and 7 more of the 30 weights of LlamaForCausalLM, which would begin as random numbers. {AGAIN}",
    ),
    "a file of the index is missing": (
        lambda folder: sharded(folder, lost_file=True),
        f"BASE/{INDEX}: names model-00001-of-00002.safetensors, which is not there; download the base model again",
    ),
    "a file lacks what the index says": (
        lambda folder: sharded(folder, lost_tensor=True),
        f"BASE/{INDEX}: says that lm_head.weight is in model-00002-of-00002.safetensors, which does not hold it",
    ),
    "a file is torn": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100]),
        f"BASE/{FILE}: missing or torn (Error while deserializing header: incomplete metadata, file not fully "
        "covered); download the base model again",
    ),
    "a file is a pointer of Git LFS": (
        lambda folder: (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n"),
        f"BASE/{FILE}: is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder",
    ),
    "no weights": (
        lambda folder: (folder / FILE).unlink(),
        f"base BASE: neither {FILE} nor {INDEX} nor pytorch_model.bin nor pytorch_model.bin.index.json; save it with "
        "save_pretrained",
    ),
    "a .bin file lacks a weight": (
        lambda folder: as_bin_without(folder, "lm_head.weight"),
        "base model BASE: its files lack lm_head.weight of the 21 weights of LlamaForCausalLM, which would begin as "
        f"random numbers. {AGAIN}",
    ),
    "quantised already": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "base model BASE: config.json has quantization_config (gptq): its weights are quantised on disk, so an adapter "
        "could not be merged into them. Take the 16-bit model that it was made of; train.quantization: nf4 quantises "
        "that at load",
    ),
    "weights of 8 bits": (
        lambda folder: edit(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)})),
        f"base model BASE: {Q} in {FILE} is stored as F8_E4M3: quantised on disk; take the 16-bit model that it was "
        "made of",
    ),
    "more tokens than rows": (
        add_tokens,
        "base model BASE: its tokenizer has 261 tokens, its embedding 259 rows: '<call>', '</call>' would be looked up "
        "outside of it. Take the tokenizer of these weights, or give the model more rows: sft convert resize BASE OUT",
    ),
    "no tokenizer": (
        without_tokenizer,
        "base model BASE: no tokenizer in it (one of tokenizer.json, tokenizer.model, vocab.json, vocab.txt, "
        "spiece.model); copy the one it was trained with",
    ),
    "NaN": (
        poison(float("nan")),
        f"base model BASE: {Q} in {FILE} holds NaN or infinity, first at [3, 5]: what is trained on it is NaN. Fetch "
        "the base model again, or take another one",
    ),
    "infinity": (
        poison(float("-inf")),
        f"base model BASE: {Q} in {FILE} holds NaN or infinity, first at [3, 5]: what is trained on it is NaN. Fetch "
        "the base model again, or take another one",
    ),
    "no causal language model": (
        lambda folder: edit_json(folder / "config.json", model_type="t5", architectures=["T5Model"]),
        "BASE/config.json: no causal language model can be made of it (Unrecognized configuration class <class "
        "'transformers.models.t5.configuration_t5.T5Config'> for this kind of AutoModel: AutoModelForCausalLM.)",
    ),
    "a generation configuration that nothing mends": (
        lambda folder: (folder / "generation_config.json").write_text('{"num_return_sequences": 4}'),
        "BASE/generation_config.json: transformers refuses to save it (Greedy methods (do_sample != True) without beam "
        "search do not support `num_return_sequences` different than 1 (got 4).); mend that key, or remove the file",
    ),
}
OF_WEIGHTS = [kind for kind in BROKEN if "token" not in kind and kind not in ("NaN", "infinity", "quantised already")]


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good one, in the present folder, with rows beside it."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"### Human: say w{i}### Assistant: w{i}!"}) + "\n" for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    shutil.copytree(tiny_model, tmp_path / "base")
    return tmp_path / "base"


VALUES: dict[str, Any] = {
    "name": "test",
    "base_model": {"path": "base"},
    "datasets": [{"path": "rows.jsonl", "map_fn": "oasst1"}],
    "eval_fraction": 0.3,
    "pack": {"max_length": 128, "chat_template": "chatml"},
    "train": {"quantization": "none"},
}


def recipe() -> Recipe:
    return resolve(VALUES)


def said(message: str, base: Path) -> str:
    return message.replace("BASE", str(base))


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_base_is_refused_before_training_by_all_who_read_it(
    kind: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, message = BROKEN[kind]
    breaks(base)
    with pytest.raises(ModelError) as planned:
        plan_recipe(recipe())
    assert str(planned.value) == said(message, Path("base"))
    with pytest.raises(ModelError) as rehearsed:
        prepare_rehearsal(recipe(), base.parent / "scratch", on_line=lambda _: None)
    assert str(rehearsed.value) == str(planned.value)
    inputs = TrainInputs(packed=base / "none", base_model=base, trust_remote_code=False, work=base.parent / "work")
    with pytest.raises(ModelError) as trained:
        train_adapter(inputs, TrainConfig(quantization="none"), 1, base.parent / "out", on_line=lambda _: None)
    assert str(trained.value) == said(message, base)
    assert not list((base.parent / "work").iterdir())
    if kind in OF_WEIGHTS and "generation" not in kind:
        with pytest.raises(ModelError) as merged:
            merge_adapter(base, base.parent / "no-adapter", base.parent / "merged", MergeOptions())
        assert str(merged.value) == said(message, base)


@pytest.mark.parametrize("command", [["explain"], ["run", "--rehearse"], ["train"]])
def test_the_command_says_it_in_one_line_and_exits_with_1(
    command: list[str], base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks, message = BROKEN["a weight is missing"]
    breaks(base)
    (base.parent / "test.yaml").write_text(json.dumps(VALUES))
    monkeypatch.setattr("sys.argv", ["sft", command[0], "test.yaml", *command[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert said(message, Path("base")) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_rank_refuses_to_begin_with_random_numbers_whatever_was_checked_before(quantization: str, base: Path) -> None:
    edit(base, lambda tensors: tensors.pop(Q))
    train = TrainConfig(quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"its files lack {Q} \(1 weights in all\)"):
        load_base(base, train, trust_remote_code=False)


def test_a_whole_base_has_nothing_to_say(base: Path) -> None:
    assert check_folder(base, numbers=True) == ()
    sharded(base)
    assert check_folder(base, numbers=True) == ()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {}])
def test_a_base_whose_generation_configuration_transformers_refuses_to_save_is_trained_converted_and_merged(
    lora: dict[str, Any] | None, base: Path, packed: Path
) -> None:
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    section, lines = config(lora=lora, max_steps=1), list[str]()
    if lora is None:
        checkpoint = train(packed, base, base.parent, section, lines.append) / "checkpoint"
    else:
        checkpoint = train_here(packed, base, base.parent, section) / "checkpoint"
        lines += [f"note: {note}" for note in check_folder(base)]  # as train says it
    words = "has temperature 0.9, top_p 0.6 without do_sample, which transformers refuses to save: do_sample is set"
    assert f"note: base model {base}: generation_config.json {words}" in lines
    out = base.parent / "converted"
    convert_checkpoint(checkpoint, out, section.lora, "base", ConvertOptions(base=base, tokenizer=base))
    if lora is not None:
        merge_adapter(base, out, base.parent / "merged", MergeOptions(base="full"))
        out = base.parent / "merged"
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(base.parent / "again")
    saved = model.generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (True, 0.9, 0.6, 2)


def test_weights_without_a_place_are_noted_and_may_be_anything(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({"mtp.weight": torch.full((2, 2), float("nan"))}))
    note = "base model base: its files hold mtp.weight, for which LlamaForCausalLM has no place: not used"
    assert check_folder(Path("base"), numbers=True) == (note,)


def test_a_token_that_is_no_text_may_have_no_row(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(base)
    note = "base model base: its embedding has no row for '<image_soft_token>', which is no text and must not occur"
    assert check_folder(Path("base")) == (note,)


def test_remote_code_is_not_run_to_look_at_it(base: Path) -> None:
    edit(base, lambda tensors: tensors.pop(Q))
    (note,) = check_folder(base, trust_remote_code=True)
    assert "trust_remote_code" in note


GENERATION: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, ""),
    (
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 0.9, "top_p": 0.6, "do_sample": True},
        "generation_config.json has temperature 0.9, top_p 0.6 without do_sample, which transformers refuses to save: "
        "do_sample is set",
    ),
    (
        {"temperature": 0.0, "eos_token_id": 2},
        {"eos_token_id": 2},
        "generation_config.json has temperature 0.0, which transformers refuses to save: left out, so answers are "
        "greedy",
    ),
    ({"pad_token_id": -1}, {}, "generation_config.json has pad_token_id -1, which is left out"),
]


@pytest.mark.parametrize(("given", "saved", "words"), GENERATION)
def test_a_generation_configuration_is_changed_as_little_as_saving_needs(
    given: dict[str, Any], saved: dict[str, Any], words: str
) -> None:
    assert saveable(given, "f") == (saved, words)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "granite": {},
    "cohere": {},
}


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_what_transformers_saves_is_whole_and_one_tensor_less_is_not(kind: str, tmp_path: Path) -> None:
    made = AutoConfig.for_model(kind, **(SMALL | ARCHITECTURES[kind]))
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    assert check_folder(tmp_path, numbers=True, whole=False) == ()
    names = sorted(load_file(tmp_path / FILE))
    edit(tmp_path, lambda tensors: tensors.pop(names[-1]))
    with pytest.raises(ModelError, match="its files lack|has the shape"):
        check_folder(tmp_path, numbers=True, whole=False)


ON_THE_HUB = """
from sft_core.base_check import check_base
from sft_core.errors import ModelError
from sft_core.recipe import BaseModelConfig

for commit in ("a" * 40, "b" * 40, "c" * 40):
    try:
        print("notes:", *check_base(BaseModelConfig(path="owner/tiny"), commit, numbers=False))
    except ModelError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_on_the_hub_headers_are_read_and_no_weights(base: Path, tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as server:
        for letter in "abc":
            folder = server.set_main("models", "owner/tiny", letter * 40)
            shutil.copytree(base, folder, dirs_exist_ok=True)
            if letter == "b":
                edit(folder, lambda tensors: tensors.pop(Q))
            if letter == "c":
                as_bin_without(folder, Q)
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        ended = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300
        )
    assert ended.stdout.splitlines() == [
        "notes:",
        f"refused: base model owner/tiny: its files lack {Q} of the 21 weights of LlamaForCausalLM, which would begin "
        f"as random numbers. {AGAIN}",
        "notes: base model owner/tiny: its weights are on the hub and were not looked at (NotASafetensorsRepoError); "
        "they are when they are here, before training",
    ]
    assert not [path for kind in ("*.safetensors", "*.bin") for path in (tmp_path / "cache").rglob(kind)]
