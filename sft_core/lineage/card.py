"""The model card that a registered version carries as its description: Markdown.

In: recipe, plan, the manifests of the steps, the verdict's words. Out: text of at most MAX_CHARACTERS.
"""

from collections.abc import Mapping

from sft_core.artifacts import Manifest
from sft_core.evaluate.report import answers_ended
from sft_core.markdown import as_code, as_text
from sft_core.plan import Plan
from sft_core.recipe import Recipe

MAX_CHARACTERS = 5000
"""What MLflow's SQL store keeps of a description."""
SHOWN = ("loss", "perplexity", "bits_per_byte", "token_accuracy", "exact_match", "rouge_l", "score")


def model_card(recipe: Recipe, plan: Plan, manifests: Mapping[str, Manifest], verdict: str) -> str:
    """What it is, what it was made of, how it scored, how to use it."""
    base = recipe.base_model.path + (f" at {plan.base_commit}" if plan.base_commit else "")
    scores = scores_table(manifests)
    sections = [
        f"# {as_text(recipe.model_name)}\n\n{as_code(base)} tuned by the recipe {as_code(recipe.name)}.",
        f"{as_text(verdict)}.",
        "## Data\n\n"
        + "\n".join(f"- {as_code(d.path)} ({as_text(d.split)}), read by {as_code(d.map_fn)}" for d in recipe.datasets),
        _rows(manifests),
        _training(recipe, manifests),
        f"## Scores\n\n{scores}" if scores else "",
        f"## Use\n\nChat messages in, one answer out: `models:/{recipe.model_name}@champion` loads in transformers\n"
        "and pyfunc, and serves with `mlflow models serve`. The chat template is the one of training.",
        "## Ancestry\n\n"
        + "\n".join(f"- {as_text(key)}: {as_code(step.fingerprint)}" for key, step in plan.steps.items()),
    ]
    return "\n\n".join(section for section in sections if section)[:MAX_CHARACTERS]


def _rows(manifests: Mapping[str, Manifest]) -> str:
    if "normalize" not in manifests or "pack" not in manifests:
        return ""
    facts, packed = manifests["normalize"].facts, manifests["pack"].facts
    return (
        f"{facts['train_rows']:,} rows to train on, {facts['heldout_rows']:,} held out; {packed['tokens']:,} tokens, "
        f"{packed['supervised_tokens']:,} of them trained."
    )


def _training(recipe: Recipe, manifests: Mapping[str, Manifest]) -> str:
    train = recipe.train
    method = "all weights" if train.lora is None else f"LoRA, rank {train.lora.r}, alpha {train.lora.lora_alpha:g}"
    lines = [f"- {method}; base weights: {train.quantization}", f"- learning rate {train.learning_rate:g}"]
    if "train" in manifests:
        manifest = manifests["train"]
        lines.append(f"- {manifest.facts['optimizer_steps']:,} optimizer steps on {as_text(manifest.device)}")
        lines.append(
            "- " + ", ".join(f"{as_text(name)} {as_text(number)}" for name, number in manifest.versions.items())
        )
    return "## Training\n\n" + "\n".join(lines)


def scores_table(manifests: Mapping[str, Manifest]) -> str:
    """Base, champion and tuned side by side, as a Markdown table; empty where none was scored."""
    names = [name for name in ("base", "champion", "tuned") if f"evaluate/{name}" in manifests]
    metrics = {name: manifests[f"evaluate/{name}"].facts["metrics"] for name in names}
    found = [metric for metric in SHOWN if any(metrics[name].get(metric) is not None for name in names)]
    if not found:
        return ""
    lines = ["| held out | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    ended = [answers_ended(manifests[f"evaluate/{name}"].facts) for name in names]
    if any(ended):
        lines.append("| answers that ended by themselves | " + " | ".join(words or "-" for words in ended) + " |")
    for metric in found:
        values = (metrics[name].get(metric) for name in names)
        lines.append(f"| {metric} | " + " | ".join("-" if v is None else f"{v:.4f}" for v in values) + " |")
    return "\n".join(lines)
