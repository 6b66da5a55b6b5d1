"""The recipe's sections: frozen, typed, unknown keys refused. A field's docstring is its help, units first."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sft_core.recipe.section import Fraction, Name, Positive, Section
from sft_core.recipe.training import TrainConfig


class BaseModelConfig(Section):
    """The pretrained model that an adapter is trained for."""

    path: str
    """Hub id or local folder with `config.json`, safetensors weights and a tokenizer."""
    revision: str | None = None
    """Hub branch, tag or commit; resolved to a commit before anything runs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read; workers must allow it
    (`SFT_ALLOW_REMOTE_CODE`)."""


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

    min_new_rows: Annotated[int, Field(ge=0)] = 0
    """Rows to train on that the champion (else the newest version) was not trained on. With fewer the run ends as
    skipped, before training, unless keys of `pack`, `train` or `base_model` changed; 0 never skips."""


class NormalizeConfig(Section):
    """Rows to conversations."""

    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Jaccard similarity (0 to 1) from which on a held-out conversation counts as one of the training side and is set
    aside; null keeps all but exact copies."""


class PackConfig(Section):
    """Conversations to token sequences, several to a row."""

    max_length: Positive = 2048
    """Tokens a packed row."""
    chat_template: str | None = None
    """Shipped name, Jinja file, or null for the tokenizer's own."""
    template_kwargs: dict[str, Any] = {}
    """Variables of the chat template: `{enable_thinking: false}`, `{date_string: 26 Jul 2024}`. They hold in training,
    in evaluation and in the saved model alike. `strftime_date` (`2026-01-01` by default) is the day that a template's
    `strftime_now` tells here; a server tells its own."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Thoughts (`reasoning_content`, `<think>` at a content's start): trained, or left out of the rows and counted."""
    train_on: Literal["all", "last"] = "all"
    """Answers of a row that are trained: all whose weight is not 0, or of these only one that is the row's last."""
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    """How sequences share rows: `best_fit` (none cut, none lost), `concat` (XTuner's: laid end to end and cut every
    `max_length` tokens, none lost) or `none` (one a row)."""
    overlong: Literal["quarantine", "error", "truncate", "split"] = "quarantine"
    """What happens to a sequence longer than `max_length` tokens; counted in any case. `split` makes several of it,
    each untrained at its first token; `truncate` keeps the head. Decided before packing, `concat` too."""


class MergeConfig(Section):
    """Adapter into base."""

    base: Literal["auto", "full", "dequantized"] = "auto"
    """Base weights the update is added to; `auto` takes those closer to what was trained, on held-out rows."""


class EvaluateConfig(Section):
    """Scores of one model on the held-out rows."""

    primary_metric: Literal[
        "loss", "bits_per_byte", "token_accuracy", "exact_match", "rouge_l", "tool_calls", "score"
    ] = "loss"
    """The metric that decides promotion; `score` is the scorer's, `tool_calls` the share of calls with the right name
    and equal arguments. Where two models read by different tokenizers or templates, `bits_per_byte` stands in for
    `loss`."""
    scorer: str | None = None
    """A function of yours, `package.module:function` or `path.py:function`: prompt messages, reference, answer -> a
    number, higher is better."""
    max_new_tokens: Positive = 256
    """Tokens generated an answer."""
    max_generated_rows: Annotated[int, Field(ge=0)] = 200
    """Held-out rows answered by generation, and as many of those that end with a call; 0 for none. Loss is measured on
    all of them."""
    batch_size: Positive = 16
    """Rows scored at a time."""
    harness_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (names, or YAML files of yours) to run as well; needs the extra `harness`. They
    are reported and decide nothing."""
    harness_limit: Positive | None = None
    """Rows of each harness task; null for all."""

    @property
    def judges_answers(self) -> bool:
        """Whether the primary metric is of generated answers."""
        return self.primary_metric in ("exact_match", "rouge_l", "tool_calls", "score")

    @model_validator(mode="after")
    def _score_has_a_scorer(self) -> "EvaluateConfig":
        if self.primary_metric == "score" and self.scorer is None:
            raise ValueError("evaluate.primary_metric is score: set evaluate.scorer to the function that gives it")
        return self


class RegisterConfig(Section):
    """The registered model, and the gate before the alias `champion`."""

    model_name: Name | None = None
    """Name in the MLflow registry; null for the recipe's name."""
    approval: Literal["auto", "manual"] = "auto"
    """`auto`: the gate decides. `manual`: what passes the gate stays `candidate` until a person answers, in the Prefect
    UI or by `sft models promote` or `reject`."""
    approval_timeout_hours: Annotated[float, Field(gt=0, le=8760)] = 72.0
    """Hours that a version which passed the gate waits for that answer; after them the champion stays."""
    by_reference: bool = False
    """Register the merged model where it lies in the store, which must be a bucket, instead of a copy in MLflow.
    Consumers then read the bucket themselves."""
    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Chance that the challenges of one champion in a year promote a model that is no better than it."""
    challenges_a_year: Positive = 365
    """Retrainings a year that `alpha` is spread over: 365 for a nightly schedule, 1460 for one every six hours."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """By how much a model must be better: a fraction of the other's loss or bits a byte, points of any other metric."""
    slice_margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """By how much a slice of the held-out rows (a data set, a length, a tag) may get worse; units as of `margin`."""
    max_merge_divergence: Annotated[float, Field(gt=0)] = 0.05
    """Nats a token, KL(trained || merged) of merge's certificate. Above it nothing is registered."""
    max_unfinished_increase: Fraction = 0.1
    """Points (0.1: ten in a hundred) by which more answers may run into `evaluate.max_new_tokens` than of the better of
    base and champion (one that ends almost none is no measure). Counted are answers whose reference takes half of that
    at most. Surely above it, or with most answers unfinished, nothing is registered; 1 registers in any case."""
    min_heldout_rows: Positive | None = None
    """Held-out rows that a run needs to begin training; null for as many as the gate needs to promote anything (7 by
    default). 1 trains with fewer, for a version that is never promoted."""


class ComputeConfig(Section):
    """Prefect deployments (`flow/deployment`) that run a part; null runs it in this process."""

    prepare: str | None = None
    """fetch, normalize, pack."""
    train: str | None = None
    """train."""
    publish: str | None = None
    """convert, merge, evaluate, register."""
    num_proc: Positive | None = None
    """Processes that normalize and pack shards of rows; null for one to every two cores, of eight or more.
    Same bytes for any number."""
    dask: str | None = None
    """Address of a Dask scheduler (`tcp://host:8786`) whose workers normalize and pack shards instead; needs the extra
    `dask`. Same bytes."""


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
    max_quarantined_fraction: Fraction = 0.05
    """Fraction of the data that may be lost on the way from source rows to packed rows: rows that no conversation can
    be made of, conversations that are too long, that the chat template refuses, that train nothing. Above it the run
    fails and names the reasons."""
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

    @model_validator(mode="after")
    def _enough_answers_to_judge_by(self) -> "Recipe":
        if not self.evaluate.judges_answers:
            return self
        from sft_core.outlook.heldout import heldout_needed, why_needed  # which know recipes

        answers = self.evaluate.max_generated_rows
        if answers < heldout_needed(self.register_):
            raise ValueError(
                f"evaluate.primary_metric is {self.evaluate.primary_metric}, a figure of generated answers, and "
                f"evaluate.max_generated_rows is {answers}: {why_needed(self.register_)}"
            )
        return self

    @model_validator(mode="after")
    def _loftq_is_counted_once(self) -> "Recipe":
        lora = self.train.lora
        if lora is not None and lora.init_lora_weights == "loftq" and self.merge.base == "full":
            raise ValueError(
                "merge.base: full with train.lora.init_lora_weights: loftq would add the correction of the 4-bit "
                "rounding to weights that were not rounded; take merge.base: dequantized or auto"
            )
        return self

    @model_validator(mode="after")
    def _references_reach_a_bucket(self) -> "Recipe":
        if self.register_.by_reference and ("://" not in self.store or self.store.startswith(("file://", "local://"))):
            raise ValueError(
                f"register.by_reference is true and the store {self.store} is a folder: MLflow takes no path of this "
                "machine; keep the store in a bucket (s3://...), or set register.by_reference to false"
            )
        return self

    @property
    def model_name(self) -> str:
        """Name in the registry."""
        return self.register_.model_name or self.name

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain JSON-able values."""
        return self.model_dump(mode="json", by_alias=True)
