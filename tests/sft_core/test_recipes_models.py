"""Each architecture of the recipes, tiny and random: the recipe with its base model and data replaced is planned and
packed. Training and merging of tiny models are tested elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_core.pack import IGNORE_INDEX, load_packed
from sft_core.plan import plan_recipe
from sft_core.recipe import Recipe, resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROWS = [f"### Human: say w{i}### Assistant: w{i}!### Human: again### Assistant: w{i}." for i in range(40)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
GEMMA3 = (  # turns as Gemma 3's own template writes them, in one line and without images
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}"
)
MISTRAL = (  # as Mistral 7B Instruct v0.3's own template writes them, without tools
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# recipe, transformers' model_type, control tokens (bos, eos, others), own template, a trained conversation
CASES = [
    (
        "llama3_1_8b_instruct_qlora_oasst1_e3",
        "llama",
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        None,
        "w7!<|eot_id|>w7.<|eot_id|>",
    ),
    ("qwen3_8b_qlora_oasst1_e3", "qwen3", (None, "<|im_end|>", "<|im_start|>"), None, "w7!<|im_end|>w7.<|im_end|>"),
    (
        "gemma3_1b_it_qlora_oasst1_e3",
        "gemma3_text",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        GEMMA3,
        "w7!<end_of_turn>w7.<end_of_turn>",
    ),
    (
        "mistral_7b_instruct_qlora_oasst1_e3",
        "mistral",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        MISTRAL,
        " w7!</s> w7.</s>",
    ),
    ("mixtral_8x7b_instruct_full_oasst1_e3", "mixtral", ("<s>", "</s>"), None, "w7!</s>w7.</s>"),
    (
        "internlm2_chat_7b_qlora_oasst1_e3",  # transformers has no InternLM2: a Llama stands in, the tokens are its own
        "llama",
        ("<s>", "<|im_end|>", "<|im_start|>"),
        None,
        "w7!<|im_end|>w7.<|im_end|>",
    ),
]
CASES += [(name.replace("_qlora_", "_full_"), *rest) for name, *rest in CASES[:2]]


def make_model(folder: Path, model_type: str, tokens: tuple[str | None, ...], own: str | None) -> Path:
    """A random model of that architecture with one token a byte and its control tokens."""
    bos, eos = tokens[:2]
    special = [token for token in ("<pad>", *tokens) if token]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>")
    fast.chat_template = own
    fast.save_pretrained(folder)
    more = {"num_local_experts": 2} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(model_type, vocab_size=len(vocabulary), **SIZES, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Retraining]:
    def make(name: str, model_type: str, tokens: tuple[str | None, ...], own: str | None) -> Retraining:
        folder = tmp_path_factory.mktemp(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
        base = make_model(folder / "base", model_type, tokens, own)
        changes: dict[str, Any] = {
            "store": str(folder / "store"),
            "base_model": {"path": str(base), "trust_remote_code": False},
            "datasets": [{"path": str(rows), "map_fn": resolve(name).datasets[0].map_fn}],
            "eval_fraction": 0.2,
            "pack": {"max_length": 256},
        }
        recipe: Recipe = resolve(name, changes)
        return Retraining(recipe, plan_recipe(recipe), Store(recipe.store), on_line=lambda _: None)

    return make


@pytest.mark.parametrize(("name", "model_type", "tokens", "own", "trained"), CASES, ids=[case[0] for case in CASES])
def test_a_recipe_is_planned_and_packed_with_a_tiny_model(
    planned: Callable[..., Retraining],
    name: str,
    model_type: str,
    tokens: tuple[str | None, ...],
    own: str | None,
    trained: str,
) -> None:
    run = planned(name, model_type, tokens, own)
    assert list(run.plan.steps)[:4] == ["fetch/0", "normalize", "pack", "train"]
    for key in ("fetch/0", "normalize", "pack"):
        built = run_step(run, key)
    assert built.manifest.ledger["sequences"]["in"] == built.manifest.facts["sequences"] > 20
    packed = load_packed(run.folder("pack"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.folder("pack") / "tokenizer")
    texts = [
        tokenizer.decode([label for label in packed.sequence(i).labels if label != IGNORE_INDEX])
        for i in range(len(packed))
    ]
    pattern = [text.replace(text[len(text) - len(text.lstrip()) :].split("!")[0], "w7") for text in texts]
    assert set(pattern) == {trained}
