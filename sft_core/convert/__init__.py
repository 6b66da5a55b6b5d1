"""Convert: Checkpoint -> Adapter, without building a model.

In: a training checkpoint (DeepSpeed ZeRO-1/2/3, plain Trainer, XTuner's `.pth`) and the recipe's `train.lora`.
Out: a PEFT folder: `adapter_model.safetensors` with the fp32 master weights, `adapter_config.json`, the tokenizer.
"""

from pathlib import Path

from sft_core.artifacts import Outcome
from sft_core.recipe import LoraConfig

STEP_VERSION = 1


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    lora: LoraConfig,
    base_model: str,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> Outcome:
    """Write the adapter held by `checkpoint` to `out`; ModelError unless it is complete, finite and trained.

    `dtype` (`float32`, `bfloat16`, `float16`) rounds the tensors; None keeps them bit for bit. `tokenizer` is a
    folder whose tokenizer travels with the adapter; None takes the one beside the checkpoint, if there is one.
    """
    from sft_core.convert.adapter import adapter_facts, adapter_tensors, write_adapter
    from sft_core.convert.layout import read_checkpoint
    from sft_core.convert.tokenizer import copy_tokenizer, find_tokenizer

    trained = read_checkpoint(checkpoint, lora)
    tensors = adapter_tensors(trained, lora, dtype)
    out.mkdir(parents=True, exist_ok=True)
    write_adapter(tensors, out, lora, base_model)
    folder = find_tokenizer(checkpoint, tokenizer)
    copied = copy_tokenizer(folder, out) if folder else ()
    return Outcome(facts={**adapter_facts(tensors, trained), "tokenizer_files": len(copied)})
