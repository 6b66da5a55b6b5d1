"""A trainer that writes small DeepSpeed checkpoints, with the live optimizer's fp32 masters beside them.

torchrun --nproc_per_node=2 tests/sft_core/deepspeed_runs.py OUT RUN...
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sft_core.recipe import LoraConfig

LORA = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0)
RICH = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, use_dora=True, use_rslora=True, modules_to_save=("lm_head",))
RUNS: dict[str, tuple[int, str, LoraConfig | None, dict[str, Any]]] = {
    "zero1-float32": (1, "float32", LORA, {}),
    "zero1-own-masters": (1, "bfloat16", LORA, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2-bfloat16": (2, "bfloat16", LORA, {}),
    "zero1-float16": (1, "float16", LORA, {}),
    "zero2-float16": (2, "float16", LORA, {}),
    "zero3-float16": (3, "float16", LORA, {}),
    "zero2-rich": (2, "bfloat16", RICH, {}),
    "zero2-full-tied": (2, "bfloat16", None, {}),
    "zero3-bfloat16": (3, "bfloat16", LORA, {}),
    "zero3-rich": (3, "bfloat16", RICH, {}),
    "zero3-full": (3, "bfloat16", None, {}),
}


def train(out: Path, stage: int, dtype: str, lora: LoraConfig | None, more: dict[str, Any]) -> None:
    """Three optimizer steps of a tiny model under DeepSpeed; `masters` holds the live optimizer's weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_core.convert.skeleton import peft_config
    from sft_core.train.targets import adapted_modules

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # nothing to compile on CPU
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 64}
    tied = out.name.endswith("tied")
    model: Any = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    )
    if int(os.environ["RANK"]) == 0:
        model.save_pretrained(out / "base")
    if lora is not None:
        model = get_peft_model(model, peft_config(lora, adapted_modules(model, lora)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8},
        **more,
    }
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}
    for step in range(3):
        seed = torch.Generator().manual_seed(7 * step + engine.global_rank)
        ids = torch.randint(64, (1, 9), generator=seed)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if step > 0:
            at = step + 1
            engine.save_checkpoint(
                str(out / f"checkpoint-{at}"), tag=f"global_step{at}", exclude_frozen_parameters=lora is not None
            )
    trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    masters = {saved_name(name): safe_get_full_fp32_param(p).clone() for name, p in trainable}
    if engine.global_rank == 0:
        save_file(masters, out / "masters")


def saved_name(name: str) -> str:
    """PEFT's, in its files."""
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


if __name__ == "__main__":
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed would import it
    for run_name in sys.argv[2:]:
        train(Path(sys.argv[1]) / run_name, *RUNS[run_name])
    torch.distributed.destroy_process_group()
