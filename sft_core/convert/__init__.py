"""Convert: Checkpoint -> Adapter (full fine-tuning: a MergedModel at once), without building a model.

In: a training checkpoint (DeepSpeed ZeRO-1/2/3, plain Trainer, XTuner's `.pth`) and the recipe's `train.lora`.
Out: a PEFT folder: `adapter_model.safetensors` with the fp32 master weights, `adapter_config.json`, the tokenizer, and
`base_model.json`, which says what base it is for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.artifacts import Outcome
from sft_core.recipe import LoraConfig

STEP_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What a checkpoint does not say. `dtype` None keeps the tensors bit for bit."""

    base: Path | None = None
    """Folder of the base model: its `config.json` says which tensors there must be. Full fine-tuning needs it."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`: rounds once."""
    tokenizer: Path | None = None
    """Folder whose tokenizer travels on; None takes the one beside the checkpoint, if there is one."""
    quantization: dict[str, Any] | None = None
    """How the base was quantised in training; recorded beside the adapter, for the merge."""
    chat_template: str | None = None
    """Jinja text, for a full model's folder; None for the tokenizer's own."""
    max_shard_size: int = 5 * 10**9
    """Bytes a file, for a full model."""
    trust_remote_code: bool = False


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    lora: LoraConfig | None,
    base_model: str,
    options: ConvertOptions | None = None,
) -> Outcome:
    """Write what `checkpoint` holds to `out`; ModelError unless it is complete, finite and trained.

    With `lora` a PEFT folder; with None (all weights trained) a complete model folder under the published names.
    `base_model`: hub id or folder, as the recipe has it.
    """
    from sft_core.base_check.identity import identity_of
    from sft_core.convert.layout import read_checkpoint
    from sft_core.convert.tokenizer import copy_tokenizer, find_tokenizer
    from sft_core.convert.writer import one_thread

    options = options or ConvertOptions()
    with one_thread():
        trained = read_checkpoint(checkpoint, lora)
        folder = find_tokenizer(checkpoint, options.tokenizer)
        base = identity_of(base_model, options.base)
        if lora is None:
            from sft_core.convert.full import write_model

            return Outcome(facts=write_model(trained, out, folder, base, options))
        from sft_core.convert.adapter import checked_tensors, write_adapter
        from sft_core.convert.initial import begins_with_base, relative_to_base

        tensors, config = checked_tensors(trained, lora, options)
        if begins_with_base(lora):
            tensors, config = relative_to_base(tensors, config, lora, trained.source)
        out.mkdir(parents=True, exist_ok=True)
        config |= {"inference_mode": True, "base_model_name_or_path": base.name}
        facts = write_adapter(tensors, trained, out, config, options)
        base.write(out)
        copied = copy_tokenizer(folder, out) if folder else ()
        return Outcome(facts={**facts, "tokenizer_files": len(copied)})
