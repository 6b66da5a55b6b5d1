"""The recipe's sections: frozen, typed, unknown keys refused. A field's docstring is its help, units first."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values cannot be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseModelConfig(Section):
    """The pretrained model that an adapter is trained for."""

    path: str
    """Hub id or local folder with `config.json`, safetensors weights and a tokenizer."""
    revision: str | None = None
    """Hub branch, tag or commit; resolved to a commit before anything runs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class DatasetConfig(Section):
    """One source of rows and the function that reads them."""

    path: str
    """Hub id, local file, glob, folder (also one that `save_to_disk` wrote), or any fsspec URL."""
    source: Literal["hub", "openmind", "modelscope"] | None = None
    """Whose id `path` is: Hugging Face's `hub`, `openmind` or `modelscope` (their packages are optional); null for a
    file or folder where there is one, else the hub."""
    name: str | None = None
    """Configuration of a hub data set (`load_dataset`'s `name`, ModelScope's `subset_name`)."""
    split: str = "train"
    """Split of a hub data set, or of a saved DatasetDict."""
    revision: str | None = None
    """Hub branch, tag or commit; resolved to a commit before anything runs (openMind, ModelScope: their rows are
    hashed instead)."""
    map_fn: str = "default"
    """Shipped name (alpaca, oasst1, openai, messages, sharegpt, ...; `sft data check FILE` names those that fit),
    `package.module:function` or `path.py:function`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Times that a row is seen in an epoch. Below 1 a fraction of the rows is kept, chosen by content and seed; with
    2.5 every row is seen twice an epoch, and every other one (drawn anew each epoch) once more."""


class ScheduleConfig(Section):
    """When a scheduled run has something to do."""

    min_new_rows: Literal[0] = 0
    """Rows that must be new. Only 0 in this version: a run is never skipped for want of new rows."""


class NormalizeConfig(Section):
    """Rows to conversations."""

    max_quarantined_fraction: Fraction = 0.05
    """Fraction of rows. Above it the run fails and names the commonest reasons."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Jaccard similarity (0 to 1) from which on a held-out conversation counts as one of the training side and is set
    aside; null keeps all but exact copies."""


class PackConfig(Section):
    """Conversations to token sequences, several to a row."""

    max_length: Positive = 2048
    """Tokens a packed row."""
    chat_template: str | None = None
    """Shipped name, Jinja file, or null for the tokenizer's own."""
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    """How sequences share rows: `best_fit` (none cut, none lost), `concat` (XTuner's: laid end to end and cut every
    `max_length` tokens, none lost) or `none` (one a row)."""
    overlong: Literal["quarantine", "error", "truncate", "split"] = "quarantine"
    """What happens to a sequence longer than `max_length` tokens; counted in any case. `split` makes several of it,
    each untrained at its first token; `truncate` keeps the head. Decided before packing, `concat` too."""


class LoraConfig(Section):
    """PEFT's LoRA, under PEFT's names."""

    r: Positive = 16
    """Rank."""
    lora_alpha: Positive = 32
    """Scale: the update is `lora_alpha / r * B A`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head), or names of modules."""


class TrainConfig(Section):
    """Training, under HF TrainingArguments' names. Steps are optimizer steps."""

    quantization: Literal["nf4", "none"] = "nf4"
    """4-bit NormalFloat base with double quantisation (QLoRA), or the base as it is."""
    lora: LoraConfig | None = LoraConfig()
    """Adapter; null trains all weights."""
    deepspeed: str | None = "zero2"
    """`zero1`, `zero2`, `zero3`, a JSON file, or null for plain Trainer checkpoints."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    """Epochs; each packs its rows anew."""
    max_steps: int | None = None
    """Optimizer steps; null for as many as the epochs need."""
    per_device_train_batch_size: Positive = 1
    """Packed rows a device."""
    gradient_accumulation_steps: Positive = 16
    """Micro-batches an optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-4
    """Peak."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Fraction of all optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's second moment decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which gradients are clipped."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more work."""
    save_steps: Positive = 500
    """Optimizer steps between checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept while training."""
    logging_steps: Positive = 10
    """Optimizer steps between metric lines."""
    num_processes: Positive | None = None
    """Ranks on this machine; null for one a GPU, or one on CPU."""

    @model_validator(mode="after")
    def _quantized_base_needs_an_adapter(self) -> "TrainConfig":
        if self.quantization == "nf4" and self.lora is None:
            raise ValueError("lora: null trains all weights, which a 4-bit base cannot do; set quantization: none")
        return self


class MergeConfig(Section):
    """Adapter into base."""

    base: Literal["auto", "full", "dequantized"] = "auto"
    """Base weights the update is added to; `auto` takes those closer to what was trained, on held-out rows."""


class EvaluateConfig(Section):
    """Scores of one model on the held-out rows."""

    primary_metric: Literal["loss", "exact_match", "token_accuracy"] = "loss"
    """The metric that decides promotion."""
    max_new_tokens: Positive = 256
    """Tokens generated an answer."""
    max_generated_rows: Annotated[int, Field(ge=0)] = 200
    """Held-out rows answered by generation; 0 for none. Loss is measured on all of them."""
    batch_size: Positive = 16
    """Rows scored at a time."""


class RegisterConfig(Section):
    """The registered model."""

    model_name: Name | None = None
    """Name in the MLflow registry; null for the recipe's name."""
    approval: Literal["auto"] = "auto"
    """`auto`: the gate decides."""


class ComputeConfig(Section):
    """Prefect deployments (`flow/deployment`) that run a part; null runs it in this process."""

    prepare: str | None = None
    """fetch, normalize, pack."""
    train: str | None = None
    """train."""
    publish: str | None = None
    """convert, merge, evaluate, register."""


class Recipe(Section):
    """One retraining, whole. Made by `sft_core.recipe.resolve` only; this frozen form is what travels."""

    name: Name
    """Names the run, and the registered model unless `register.model_name` does."""
    seed: int = 42
    """Seed of everything that is drawn."""
    store: str = "./store"
    """Folder or fsspec URL of the artifact store."""
    base_model: BaseModelConfig
    datasets: tuple[DatasetConfig, ...]
    eval_datasets: tuple[DatasetConfig, ...] = ()
    """Held-out rows of their own; with them `eval_fraction` may be 0."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Fraction of conversations held out, by a hash of their content."""
    schedule: ScheduleConfig = ScheduleConfig()
    normalize: NormalizeConfig = NormalizeConfig()
    pack: PackConfig = PackConfig()
    train: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register_: RegisterConfig = Field(default=RegisterConfig(), alias="register")
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "Recipe":
        if not self.datasets:
            raise ValueError("datasets is empty: name at least one source of rows")
        return self

    @model_validator(mode="after")
    def _something_is_held_out(self) -> "Recipe":
        if self.eval_fraction == 0 and not self.eval_datasets:
            raise ValueError("eval_fraction is 0 and eval_datasets is empty: nothing would be held out to judge by")
        return self

    @property
    def model_name(self) -> str:
        """Name in the registry."""
        return self.register_.model_name or self.name

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain JSON-able values."""
        return self.model_dump(mode="json", by_alias=True)
