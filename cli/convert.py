"""`sft convert pth-to-hf` and `sft convert merge`, on plain folders, under XTuner's names."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sft_core.terminal import say

if TYPE_CHECKING:
    from sft_core.recipe import BaseModelConfig, LoraConfig

app = typer.Typer(no_args_is_help=True, help="Checkpoint to adapter, adapter to merged model, on plain folders.")
UNFINISHED = ".unfinished"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ShardSize = Annotated[str | None, typer.Option(help="Largest weight file, such as 5GB or 500MB.")]


@app.command("pth-to-hf")
def pth_to_hf(  # noqa: PLR0913
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe of the training: rank, alpha, base model.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth file, or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="Round to float16, bfloat16 or float32; as trained (fp32 masters) by default.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank, where it is not the recipe's.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Alpha, where it is not the recipe's.")] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Target module, where they are not the recipe's; may be repeated.")
    ] = None,
    max_shard_size: ShardSize = None,
) -> None:
    """Extract what a training checkpoint holds: a PEFT folder, or after full fine-tuning (`train.lora: null`) a model
    folder. No model is built, no pickled code runs. Where the base model is on this disk, its config.json is the proof
    that no tensor is missing.
    """
    from sft_core.convert import ConvertOptions, convert_checkpoint
    from sft_core.convert.writer import shard_size
    from sft_core.recipe import resolve

    resolved = resolve(recipe)
    lora = _overridden(resolved.train.lora, r, lora_alpha, target_modules)
    base = _local_base(resolved.base_model)
    quantization = {"quantization": resolved.train.quantization, "compute_dtype": resolved.train.dtype}
    options = ConvertOptions(
        base=base,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=resolved.base_model.trust_remote_code,
        **({"max_shard_size": shard_size(max_shard_size)} if max_shard_size else {}),
    )
    with _filled(out) as folder:
        outcome = convert_checkpoint(checkpoint, folder, lora, resolved.base_model.path, options)
    say(f"{out}: {outcome.facts['tensors']} tensors, {outcome.facts['parameters']:,} parameters")
    if base is None:
        say(f"not checked against the base model: {resolved.base_model.path} is no folder here")


@app.command()
def merge(  # noqa: PLR0913
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    base_weights: Annotated[
        str,
        typer.Option("--base", help="full, dequantized (what a QLoRA adapter was trained on), auto (measure both)."),
    ] = "full",
    certify_with: Annotated[
        Path | None,
        typer.Option(help="Held-out rows (JSON Lines or Parquet with `messages`, or a Conversations folder)."),
    ] = None,
    max_shard_size: ShardSize = None,
    push_to: Annotated[str | None, typer.Option(help="Hub repository to upload the folder to.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the base.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Merge into a base that the adapter was not trained on.")
    ] = False,
) -> None:
    """Add an adapter to its base model: one complete HF folder with tokenizer and chat template."""
    from sft_core.convert.writer import shard_size
    from sft_core.errors import RecipeError, SourceError
    from sft_core.merge import MergeOptions, merge_adapter, push_folder

    if base_weights not in ("full", "dequantized", "auto"):
        raise RecipeError(f"--base {base_weights!r}: say full, dequantized or auto")
    if certify_with is not None and not certify_with.exists():
        raise SourceError(f"--certify-with {certify_with}: no such file")
    options = MergeOptions(
        base=base_weights,
        quantization="none" if base_weights == "full" else "nf4",
        held_out=certify_with,
        certify=certify_with is not None,
        max_shard_size=shard_size(max_shard_size) if max_shard_size else None,
        trust_remote_code=trust_remote_code,
        other_base=other_base,
    )
    with _filled(out) as folder:
        facts = merge_adapter(base, adapter, folder, options).facts
    say(f"{out}: {facts['merged']} of {facts['tensors']} tensors merged into the {facts['base_weights']} base weights")
    say(f"merged by {facts['merged_by']}")
    say(f"base: {facts['base']}")
    certificate = facts["certificate"]
    say(
        f"certified: {certificate['candidates']}"
        if certificate["certified"]
        else f"not certified: {certificate['why']}"
    )
    if push_to is not None:
        say(f"uploaded: {push_folder(out, push_to)}")


@app.command()
def resize(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    add: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN", help="Special token that the tokenizer gets first; repeatable.")
    ] = None,
) -> None:
    """Give a base model a row of its embeddings for every token of its tokenizer, and for those of --add.

    A new row is the mean of the others, and has to be trained: train.lora.trainable_tokens, or all weights. Name OUT as
    base_model.path.
    """
    from sft_core.base_check.vocabulary import resize as resize_base
    from sft_core.base_model import local_base_model
    from sft_core.recipe import BaseModelConfig

    with _filled(out) as folder:
        made = resize_base(local_base_model(BaseModelConfig(path=base), None), folder, add or ())
    say(f"{out}: {made.after:,} token rows, {len(made.tokens):,} of them new: the mean of the others")
    say(f"to train them: base_model.path: {out}, train.lora.trainable_tokens: {json.dumps(made.tokens)}")


def _overridden(
    lora: "LoraConfig | None", r: int | None, lora_alpha: int | None, target_modules: list[str] | None
) -> "LoraConfig | None":
    from sft_core.errors import RecipeError

    flags = {"r": r, "lora_alpha": lora_alpha, "target_modules": tuple(target_modules) if target_modules else None}
    given = {name: value for name, value in flags.items() if value is not None}
    if lora is None:
        if given:
            raise RecipeError(f"--{next(iter(given)).replace('_', '-')}: the recipe's train.lora is null; no adapter")
        return None
    return lora.model_validate({**lora.model_dump(), **given})


def _local_base(config: "BaseModelConfig") -> Path | None:
    """The base's folder, if it is on this disk; nothing is downloaded."""
    folder = Path(config.path)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder in `out` whose files move up when all are written. What fails leaves nothing; what is killed leaves
    `out` without a config.json, which nothing takes for a model.
    """
    from sft_core.errors import ModelError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        left = (
            f"remove {UNFINISHED}, which a killed run left" if (out / UNFINISHED).exists() else "choose another folder"
        )
        raise ModelError(f"{out}: exists and is not empty; nothing was written: {left}")
    was_there, folder = out.exists(), out / UNFINISHED
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in sorted(folder.iterdir(), key=lambda path: (path.name.endswith("config.json"), path.name)):
            path.rename(out / path.name)
    except BaseException as error:
        shutil.rmtree(folder)
        if not was_there:
            with suppress(OSError):
                out.rmdir()
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise ModelError(
                f"{out}: {error.strerror}; nothing was written. Make room, or choose another disk"
            ) from None
        raise
    folder.rmdir()
