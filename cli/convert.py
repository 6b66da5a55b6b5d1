"""`sft convert pth-to-hf` and `sft convert merge`, on plain folders, under XTuner's names."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Checkpoint to adapter, adapter to merged model, on plain folders.")


@app.command("pth-to-hf")
def pth_to_hf(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe of the training: rank, alpha, base model.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth file, or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="Round to float16, bfloat16 or float32; as trained (fp32 masters) by default.")
    ] = None,
) -> None:
    """Extract the LoRA adapter of a training checkpoint as a PEFT folder. No model is built, no pickled code runs."""
    from sft_core.convert import convert_checkpoint
    from sft_core.errors import RecipeError
    from sft_core.recipe import resolve

    resolved = resolve(recipe)
    if resolved.train.lora is None:
        raise RecipeError(f"{recipe}: train.lora is null; there is no adapter to extract")
    _require_free(out)
    outcome = convert_checkpoint(checkpoint, out, resolved.train.lora, resolved.base_model.path, dtype)
    print(f"{out}: {outcome.facts['tensors']} tensors, {outcome.facts['parameters']:,} parameters")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    base_weights: Annotated[
        str, typer.Option("--base", help="full, or dequantized (what a QLoRA adapter was trained on).")
    ] = "full",
) -> None:
    """Add an adapter to its base model: one complete HF folder with tokenizer and chat template."""
    from sft_core.errors import RecipeError
    from sft_core.merge import MergeOptions, merge_adapter

    if base_weights not in ("full", "dequantized"):
        raise RecipeError(f"--base {base_weights!r}: say full or dequantized")
    _require_free(out)
    quantization = "nf4" if base_weights == "dequantized" else "none"
    options = MergeOptions(
        base=base_weights,
        quantization=quantization,
        compute_dtype="bfloat16",
        held_out=None,
        chat_template=None,
        seed=0,
    )
    outcome = merge_adapter(base, adapter, out, options)
    print(f"{out}: merged into the {base_weights} base weights; {outcome.facts}")


def _require_free(out: Path) -> None:
    from sft_core.errors import ModelError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: exists and is not empty; nothing was written. Choose another folder")
    out.mkdir(parents=True, exist_ok=True)
