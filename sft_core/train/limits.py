"""What cannot be trained is refused before anything is loaded; what is costly is said.

In: the section `train`, and where they are known the number of ranks and whether there is a GPU. Out: notes for a
person; RecipeError with the reason.
"""

from sft_core.errors import RecipeError
from sft_core.recipe import TrainConfig
from sft_core.train.zero import deepspeed_config, zero_stage


def check_training(train: TrainConfig, num_processes: int | None = None, cuda: bool | None = None) -> list[str]:
    """Notes on what is costly. RecipeError for what cannot work."""
    stage = zero_stage(deepspeed_config(train))
    if train.lora is not None and train.lora.use_dora and stage == 3:
        raise RecipeError(
            f"train.lora.use_dora with deepspeed {train.deepspeed}: under ZeRO-3 PEFT's DoRA trains to other weights "
            "than without it; take zero2, or use_dora: false"
        )
    start = str(train.lora.init_lora_weights) if train.lora is not None else ""
    if stage == 3 and start.startswith(("pissa", "loftq")):
        raise RecipeError(
            f"train.lora.init_lora_weights {start} with deepspeed {train.deepspeed}: it takes whole weights, and under "
            "ZeRO-3 each rank holds parts; take zero2, or init_lora_weights: true"
        )
    if stage == 3 and train.lora is not None and train.lora.trainable_tokens:
        raise RecipeError(
            f"train.lora.trainable_tokens with deepspeed {train.deepspeed}: it takes rows of whole weights, and under "
            "ZeRO-3 each rank holds parts; take zero2, or modules_to_save"
        )
    _check_shared_rows(train, num_processes)
    if train.sample_prompts and stage == 3:
        raise RecipeError(
            f"train.sample_prompts with deepspeed {train.deepspeed}: under ZeRO-3 no rank holds the whole model to "
            "answer with; take zero2, or sample_prompts: []"
        )
    if cuda is False and train.dtype == "float16":
        raise RecipeError("train.dtype float16: needs a GPU (its loss scaling has no CPU form); take bfloat16")
    if stage == 3 and train.quantization == "nf4":
        return [
            f"note: deepspeed {train.deepspeed} with quantization nf4: each of the {num_processes or 'several'} ranks "
            "first loads the whole 4-bit base, then it is partitioned"
        ]
    return []


def _check_shared_rows(train: TrainConfig, num_processes: int | None) -> None:
    size = train.sequence_parallel_size
    if num_processes is not None and num_processes % size:
        raise RecipeError(
            f"train.sequence_parallel_size {size} with {num_processes} ranks: ranks share rows in groups of {size}; "
            f"set num_processes to a multiple of {size}"
        )
    if size > 1 and train.neftune_noise_alpha is not None:
        raise RecipeError(
            f"train.sequence_parallel_size {size} with neftune_noise_alpha: the noise's size goes by the length of "
            "a row, of which a rank sees a part; set one of them to its default"
        )
