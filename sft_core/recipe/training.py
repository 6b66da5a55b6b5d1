"""The recipe's section `train`, and `train.lora` in it. A field's docstring is its help, units first."""

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sft_core.recipe.section import Fraction, Positive, Section

DEEPSPEED_PRESETS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


class LoraConfig(Section):
    """PEFT's LoRA, under PEFT's names."""

    r: Positive = 16
    """Rank."""
    lora_alpha: Positive = 32
    """Scale: the update is `lora_alpha / r * B A`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction. 0 is quicker and, without checkpointing, needs a third less memory for activations: `sft explain RECIPE
    --gpu h100` says how much."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head and the routers of experts), or names of modules."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained whole beside the adapter, such as `embed_tokens` and `lm_head`."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens, such as `<|im_end|>`, whose rows of the embedding and of the output head are trained beside the adapter:
    for tokens that were added to the base, or that it never learned. `modules_to_save` trains all rows instead."""
    use_rslora: bool = False
    """Rank-stabilised scale: `lora_alpha / sqrt(r)`."""
    use_dora: bool = False
    """Weight-decomposed update: direction by LoRA, length by a trained vector."""
    init_lora_weights: bool | str = True
    """`true` (A random, B zero), `gaussian`, `pissa` (the base's principal part is what is trained; quicker, by an
    approximate SVD: `pissa_niter_16`; with `quantization: none`), `loftq` (corrects the 4-bit rounding; with `nf4`)."""

    @field_validator("init_lora_weights")
    @classmethod
    def _known_initialisation(cls, value: bool | str) -> bool | str:
        if value in (True, "gaussian", "loftq") or re.fullmatch(r"pissa(_niter_[1-9]\d*)?", str(value)):
            return value
        if value is False:
            raise ValueError("false starts from random A and B, so the first step already differs from the base; true")
        if str(value).startswith(("olora", "corda", "eva", "lora_ga", "mica", "orthogonal")):
            raise ValueError("PEFT has it, no converter here was tried with it; take true, gaussian, pissa or loftq")
        raise ValueError("it is one of true, gaussian, pissa, pissa_niter_16 (or another number), loftq")


class TrainConfig(Section):
    """Training, under HF TrainingArguments' names. Steps are optimizer steps."""

    quantization: Literal["nf4", "none"] = "nf4"
    """4-bit NormalFloat base with double quantisation (QLoRA), or the base as it is."""
    lora: LoraConfig | None = LoraConfig()
    """Adapter; null trains all weights."""
    deepspeed: str | None = "zero2"
    """`zero1`, `zero2`, `zero2_offload`, `zero3`, `zero3_offload` (also as `deepspeed_zero2`), a JSON file, or null for
    plain Trainer checkpoints."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype; what is trained is kept in float32 besides."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    """Epochs; each packs its rows anew."""
    max_steps: Positive | None = None
    """Optimizer steps; null for as many as the epochs need."""
    per_device_train_batch_size: Positive | Literal["auto"] = 1
    """Packed rows a device and micro-batch. `auto`: as many as are quickest in the memory that is free; the rows of an
    optimizer step stay those of `gradient_accumulation_steps`."""
    gradient_accumulation_steps: Positive = 16
    """Micro-batches an optimizer step; where `per_device_train_batch_size` is `auto`, packed rows a device and
    optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Fraction of all optimizer steps, rounded up; over n of them the rate rises by equal parts from 1/(n+1) of its
    peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's: added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which gradients are clipped."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength of the noise on embeddings in training (NEFTune: 5 to 15); its length is that of the packed row."""
    gradient_checkpointing: bool | Literal["auto"] = True
    """Recompute activations in the backward pass: less memory, a third more work. `auto`: in as few layers as the free
    memory allows."""
    fused_lora: bool = True
    """Add the adapter's update by the matrix product itself, where it is a plain one: less memory traffic, the same
    result but for rounding. `false` for PEFT's own forward."""
    use_liger_kernel: bool = True
    """On a GPU where liger-kernel is installed: its RMSNorm, rotary embedding and SwiGLU, the same but for rounding."""
    save_steps: Positive = 500
    """Optimizer steps between checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept while training."""
    logging_steps: Positive = 10
    """Optimizer steps between metric lines."""
    eval_steps: Positive | None = None
    """Optimizer steps between two losses over the held-out conversations (and one at the end); null for none."""
    load_best_model_at_end: bool = False
    """Whether the result is the checkpoint with the lowest held-out loss, and not the last one."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a lower held-out loss after which training ends; null for never."""
    sample_prompts: tuple[str, ...] = ()
    """What users might say, answered greedily at every evaluation, for people to read."""
    sample_max_new_tokens: Positive = 64
    """Tokens of such an answer at most."""
    sequence_parallel_size: Positive = 1
    """Ranks that share each packed row (Ulysses), for rows too long for one GPU; divides the ranks and the heads."""
    deterministic: bool = False
    """Whether a GPU too has to give the same bits each time: slower, in attention's backward pass above all."""
    num_processes: Positive | None = None
    """Ranks on this machine; null for one a GPU, or one on CPU."""

    @field_validator("deepspeed")
    @classmethod
    def _one_spelling(cls, value: str | None) -> str | None:
        short = (value or "").removeprefix("deepspeed_")
        return short if short in DEEPSPEED_PRESETS else value

    @property
    def rows_at_once(self) -> int:
        """Packed rows of a device's micro-batch; 1 while it is `auto`, as `gradient_accumulation_steps` counts rows."""
        return 1 if self.per_device_train_batch_size == "auto" else self.per_device_train_batch_size

    def rows_a_step(self, ranks: int) -> int:
        """Packed rows an optimizer step, of all ranks."""
        sharing = max(1, ranks // self.sequence_parallel_size)
        return self.rows_at_once * self.gradient_accumulation_steps * sharing

    def optimizer_steps(self, packed_rows: float, ranks: int) -> int:
        """Of the whole training; `packed_rows` of all epochs."""
        return self.max_steps or max(1, math.ceil(packed_rows / self.rows_a_step(ranks)))

    @property
    def heeds_held_out_loss(self) -> bool:
        """Whether the held-out loss decides what comes out."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @model_validator(mode="after")
    def _evaluations_have_a_time(self) -> "TrainConfig":
        if self.eval_steps is None and (self.heeds_held_out_loss or self.sample_prompts):
            keys = ("load_best_model_at_end", "early_stopping_patience", "sample_prompts")
            raise ValueError(f"{next(key for key in keys if getattr(self, key))}: works at evaluations; set eval_steps")
        return self

    @model_validator(mode="after")
    def _quantized_base_needs_an_adapter(self) -> "TrainConfig":
        if self.quantization == "nf4" and self.lora is None:
            raise ValueError("lora: null trains all weights, which a 4-bit base cannot do; set quantization: none")
        start = str(self.lora.init_lora_weights) if self.lora is not None else ""
        if self.quantization == "none" and start == "loftq":
            raise ValueError(
                "lora.init_lora_weights: loftq corrects 4-bit rounding, of which quantization: none has none"
            )
        if self.quantization == "nf4" and start.startswith("pissa"):
            raise ValueError(
                f"lora.init_lora_weights: {start} takes the principal part out of the base, and what is left would be "
                "rounded to 4 bits: a base that is kept nowhere, and no adapter is right for the published one; set "
                "quantization: none, or take loftq"
            )
        if start == "loftq" and self.lora is not None and self.lora.use_dora:
            raise ValueError("lora.init_lora_weights: loftq changes directions, so use_dora's lengths no longer fit")
        return self
