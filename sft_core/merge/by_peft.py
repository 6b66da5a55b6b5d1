"""What the stream cannot do, by PEFT itself: the model is loaded whole in fp32, merged, rounded once and saved.

In: base folder, adapter folder. Out: safetensors under the model's published names.
"""

import json
from pathlib import Path

import torch

from sft_core.errors import ModelError
from sft_core.merge import MergeOptions
from sft_core.merge.adapter import Adapter
from sft_core.merge.shards import Place
from sft_core.merge.stream import MergeCount


def merge_by_peft(base: Path, adapter: Adapter, out: Path, options: MergeOptions, places: list[Place]) -> MergeCount:
    """Write the weight files. ModelError where PEFT refuses, finds no place for a tensor, or nothing changes."""
    import warnings

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtypes = {place.dtype for place in places if place.dtype.is_floating_point}
    if len(dtypes) != 1:
        raise ModelError(f"base {base}: has weights of {sorted(map(str, dtypes))}; PEFT's merge needs one dtype")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=options.trust_remote_code)
    if adapter.vocabulary:
        model.resize_token_embeddings(adapter.vocabulary, mean_resizing=False)  # the adapter holds all rows
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(model, adapter.folder)
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, UserWarning, KeyError, IndexError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(f"{adapter.folder}: PEFT cannot merge it ({why})") from None
    merged = merged.to(dtypes.pop())
    changed = sum(
        not torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in merged.state_dict().items()
    )
    if not changed:
        raise ModelError(f"merged model equals its base {base}: no update survives rounding; was the adapter trained?")
    keep = {name: (out / name).read_bytes() for name in ("config.json", "generation_config.json")}
    merged.save_pretrained(out, max_shard_size=options.max_shard_size or "5GB")
    untied = json.loads((out / "config.json").read_text("utf-8")).get("tie_word_embeddings")
    for name, content in keep.items():
        (out / name).write_bytes(content)
    config = json.loads(keep["config.json"])
    if untied is False and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    for part in (config, config.get("text_config")):
        if adapter.vocabulary and isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = adapter.vocabulary
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, "utf-8")
    return MergeCount(total=len(places), merged=changed)
