"""Override models: each section again with every key optional and no default (DESIGN 5).

A form, or a serialised parameter, can so never overwrite what it does not mention: only keys that were set count.
"""

from collections.abc import Mapping
from typing import Any, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model

from sft_core.recipe import sections, training
from sft_core.recipe.section import Section


def _without_defaults(schema: dict[str, Any]) -> None:
    for entry in schema.get("properties", {}).values():
        entry.pop("default", None)


def override_model(section: type[Section], keys: tuple[str, ...] | None = None) -> type[BaseModel]:
    """The section with all keys (or `keys`) optional; bounds and help stay."""
    fields: dict[str, Any] = {}
    for key, info in section.model_fields.items():
        if keys is not None and key not in keys:
            continue
        nested = key == "lora"
        annotation = override_model(training.LoraConfig) if nested else info.rebuild_annotation()
        fields[key] = (Optional[annotation], Field(default=None, description=info.description))  # noqa: UP045
    name = section.__name__.removesuffix("Config") + "Overrides"
    config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_without_defaults)
    return create_model(name, __config__=config, __doc__=section.__doc__, **fields)


GeneralOverrides = override_model(sections.Recipe, ("name", "seed", "store", "eval_fraction"))
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
    """One nested mapping of what was really set, as `resolve` takes it; None sections are left out."""
    top = general.model_dump(mode="json", exclude_unset=True) if general is not None else {}
    dumped = {
        key: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
        for key, value in by_section.items()
        if value is not None
    }
    return {**top, **dumped}
