"""XTuner's data sets as the recipe's `datasets` and `pack`.

In: `train_dataloader.dataset` (or `train_dataset`): `process_hf_dataset`, `process_ms_dataset`, or a `ConcatDataset` of
them. Out: lines `datasets`, `pack.*`.
"""

from typing import Any

from sft_core.errors import RecipeError
from sft_core.normalize.load import shipped_name
from sft_core.pack.chat_templates import shipped_templates
from sft_core.recipe.xtuner.config import MERGED, Config, last_name
from sft_core.recipe.xtuner.literals import Symbol

PROCESSORS = ("process_hf_dataset", "process_ms_dataset")
FILE_BUILDERS = ("json", "csv", "parquet", "arrow", "text")


def read_data(config: Config) -> None:
    """Set `datasets` and `pack`. RecipeError if no data set of texts is found."""
    at = "train_dataloader.dataset" if isinstance(config.get("train_dataloader.dataset"), dict) else "train_dataset"
    parts = list(_processors(config, at))
    entries = [entry for part in parts for entry in _entries(config, part)]
    if not entries:
        found = "; ".join(f"{remark.name} is {remark.value}" for remark in config.remarks if "dataset" in remark.name)
        raise RecipeError(
            f"{config.file}: no data set found{f' ({found})' if found else ''}: train_dataloader.dataset has to be one "
            f"of {', '.join(PROCESSORS)}, or a ConcatDataset of them. If it comes from another file: {MERGED}"
        )
    config.set("datasets", entries, f"{at}.dataset" if parts == [at] else f"{at}.datasets")
    _read_pack(config, parts)


def _processors(config: Config, path: str) -> list[str]:
    kind = last_name(config.get(f"{path}.type"))
    if kind == "ConcatDataset":
        count = len(config.items(f"{path}.datasets"))
        return [inner for i in range(count) for inner in _processors(config, f"{path}.datasets.{i}")]
    if kind in PROCESSORS:
        return [path]
    if kind:
        config.remark(path, config.get(path), f"no data set of texts that can be imported is made by {kind}")
    return []


def _entries(config: Config, part: str) -> list[dict[str, Any]]:
    """One entry of `datasets` a file or hub data set."""
    loader = f"{part}.dataset"
    split = config.literal(f"{part}.split") or config.literal(f"{loader}.split")
    common = {
        "source": _source(config, part, loader),
        "name": config.literal(f"{loader}.name") or config.literal(f"{loader}.subset_name"),
        "split": split,
        "revision": config.literal(f"{loader}.revision"),
        "map_fn": _map_fn(config, f"{part}.dataset_map_fn"),
    }
    kept = {key: value for key, value in common.items() if value is not None}
    return [{"path": path} | kept for path in _paths(config, loader, split or "train")]


def _source(config: Config, part: str, loader: str) -> str | None:
    kind = str(config.get(f"{loader}.type"))
    if "OmDataset" in kind:
        return "openmind"
    return "modelscope" if "MsDataset" in kind or last_name(config.get(f"{part}.type")) == PROCESSORS[1] else None


def _paths(config: Config, loader: str, split: str) -> list[str]:
    names = ("path", "dataset_path", "dataset_id", "dataset_name")
    found = next((path for name in names if (path := config.literal(f"{loader}.{name}")) is not None), None)
    files = config.literal(f"{loader}.data_files")
    if isinstance(files, dict):
        files = files.get(split) or [file for group in files.values() for file in _listed(group)]
    files = [str(file) for file in _listed(files)] or _listed(config.literal(f"{loader}.data_dir"))
    if not files:
        return [found] if isinstance(found, str) else []
    if found not in FILE_BUILDERS:
        return [f"hf://datasets/{found}/{file}" for file in files]
    return [str(file) for file in files]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _map_fn(config: Config, path: str) -> str:
    """A shipped name, else where the user's own function is."""
    value = config.get(path)
    if value is None:
        return "default"  # rows that have their `conversation` already
    name = last_name(value)
    shipped = shipped_name(name)
    if shipped:
        return shipped
    module = value.module if isinstance(value, Symbol) else str(value).rpartition(".")[0]
    if module.startswith(".") and module.strip("."):
        file = config.file.parent.joinpath(*[".."] * (len(module) - len(module.lstrip(".")) - 1))
        return f"{file / module.strip('.').replace('.', '/')}.py:{name}"
    if module and name and not module.startswith("xtuner"):
        return f"{module}:{name}"
    what = f"move {name} to my_map_fns.py" if name and not module else "write one in my_map_fns.py"
    config.remark(path, value, f"no map_fn of that name ships: {what}, it has XTuner's contract")
    return f"my_map_fns.py:{name if name.isidentifier() else 'map_fn'}"


def _read_pack(config: Config, parts: list[str]) -> None:
    first, *others = parts
    config.copy("pack.max_length", f"{first}.max_length")
    template = _template(config, first)
    if template is not None:
        config.set("pack.chat_template", template, f"{first}.template_map_fn")
    packs = config.literal(f"{first}.pack_to_max_length") in (None, True)
    why = " (`concat` lays rows as XTuner did, across conversations)" if packs else ""
    config.set("pack.packing", "best_fit" if packs else "none", f"{first}.pack_to_max_length{why}")
    config.set("pack.overlong", "truncate", "XTuner cuts what is longer than max_length; `quarantine` is the default")
    for other in others:
        for key in ("max_length", "pack_to_max_length", "template_map_fn.template"):
            value = config.get(f"{other}.{key}")
            if value != config.get(f"{first}.{key}"):
                config.remark(f"{other}.{key}", value, "differs from the first data set's; one recipe has one value")


def _template(config: Config, part: str) -> str | None:
    value = config.get(f"{part}.template_map_fn.template")
    config.get(f"{part}.template_map_fn.type")
    name = last_name(value)
    if name in shipped_templates():
        return name
    if value is not None or config.get(f"{part}.template_map_fn") is not None:
        why = "no template of that name ships: set pack.chat_template to a Jinja file; null is the model's own"
        config.remark(f"{part}.template_map_fn", value, why)
    return None
