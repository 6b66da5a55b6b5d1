"""Override models: each section again with every key optional and no default (DESIGN 5).

In: the sections. Out: models whose JSON schema is the form of the Prefect UI, and the keys that a form really set.
A form, or a serialised parameter, can so never overwrite what it does not mention. A switch of that form always sends
a value, false where it was not touched; so a boolean is offered as a choice of two, which sends nothing until chosen.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from sft_core.recipe import sections, training
from sft_core.recipe.section import Section

CHOICE = [True, False]
LABEL = "change"
"""What the form's button says that opens a section."""


def override_model(section: type[Section], keys: tuple[str, ...] | None = None) -> type[BaseModel]:
    """The section with all keys (or `keys`) optional; bounds and help stay, and are told in the help."""
    fields: dict[str, Any] = {}
    for key, info in section.model_fields.items():
        if keys is not None and key not in keys:
            continue
        annotation = override_model(training.LoraConfig) | None if key == "lora" else info.rebuild_annotation()
        fields[key] = (annotation, Field(default=None, title=key, description=info.description))
    name = section.__name__.removesuffix("Config") + "Overrides"

    def as_form(schema: dict[str, Any]) -> None:
        _as_form(schema, section)

    config = ConfigDict(extra="forbid", frozen=True, title=LABEL, json_schema_extra=as_form)
    never_null = {key for key, (annotation, _) in fields.items() if type(None) not in get_args(annotation)}

    def drop_nulls(values: Any) -> Any:
        """Null, where it cannot be meant, is what a form sends for a field that was not filled in."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in never_null}

    before: Any = model_validator(mode="before")(drop_nulls)
    return create_model(name, __config__=config, __doc__=section.__doc__, __validators__={"drop": before}, **fields)


def _as_form(schema: dict[str, Any], section: type[Section]) -> None:
    for key, entry in schema.get("properties", {}).items():
        entry.pop("default", None)
        _offer_choice(entry)
        told = [*_bounds(entry), *_default(section.model_fields[key].default)]
        if told:
            entry["description"] = f"{' '.join(entry.get('description', '').split())} ({'; '.join(told)})"


def _offer_choice(entry: dict[str, Any]) -> None:
    if entry.get("type") == "boolean":
        del entry["type"]
        entry["enum"] = CHOICE
    for kind in entry.get("anyOf", ()):
        _offer_choice(kind)
        if kind.get("enum") == CHOICE:
            kind["title"] = "bool"
    if "anyOf" in entry:  # the form opens with the first
        entry["anyOf"].sort(key=lambda kind: (kind.get("type") == "null", kind.get("enum") == CHOICE))


def _bounds(entry: Mapping[str, Any]) -> list[str]:
    words = {
        "exclusiveMinimum": "above {}",
        "minimum": "at least {}",
        "exclusiveMaximum": "below {}",
        "maximum": "at most {}",
    }
    kinds = [entry, *entry.get("anyOf", ())]
    return [text.format(kind[bound]) for kind in kinds for bound, text in words.items() if bound in kind]


def _default(value: object) -> list[str]:
    simple = isinstance(value, bool | int | float | str)
    return [f"{json.dumps(value)} where the recipe does not say"] if simple else []


GeneralOverrides = override_model(
    sections.Recipe, ("name", "seed", "store", "eval_fraction", "max_quarantined_fraction")
)
BaseModelOverrides = override_model(sections.BaseModelConfig)
ScheduleOverrides = override_model(sections.ScheduleConfig)
NormalizeOverrides = override_model(sections.NormalizeConfig)
PackOverrides = override_model(sections.PackConfig)
TrainOverrides = override_model(training.TrainConfig)
MergeOverrides = override_model(sections.MergeConfig)
EvaluateOverrides = override_model(sections.EvaluateConfig)
RegisterOverrides = override_model(sections.RegisterConfig)
ComputeOverrides = override_model(sections.ComputeConfig)


def collect_overrides(general: BaseModel | None, by_section: Mapping[str, Any]) -> dict[str, Any]:
    """One nested mapping of what was really set, as `resolve` takes it.

    None sections are left out, and so is one that was opened and left empty: an empty `lora` is not an adapter.
    """
    top = general.model_dump(mode="json", exclude_unset=True) if general is not None else {}
    dumped = {
        key: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
        for key, value in by_section.items()
        if value is not None
    }
    return _without_empty({**top, **dumped})


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = {key: _without_empty(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value != {}}
