"""prefect.yaml without a silent typo: Prefect ignores unknown keys of a deployment and unknown parameter names."""

import importlib
import inspect
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import DeploymentConfig, RawScheduleConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentTriggerTypes
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "flows" / "prefect.yaml"


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class WorkPool(Strict):
    """Where runs of a deployment go."""

    name: Literal["cpu", "gpu"]
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class Limit(Strict):
    """How many runs of a deployment at a time; a further one waits."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE"]
    grace_period_seconds: int = Field(ge=60)


class Schedule(Strict):
    """Every key that a redeployment would otherwise choose itself is there."""

    slug: str
    cron: str
    timezone: str
    active: Literal[False]
    parameters: dict[str, Any] = {}

    @field_validator("cron")
    @classmethod
    def _a_cron_expression(cls, value: str) -> str:
        return CronSchedule(cron=value).cron

    @field_validator("timezone")
    @classmethod
    def _a_time_zone(cls, value: str) -> str:
        return ZoneInfo(value).key


class Deployment(Strict):
    """What this project uses of Prefect's DeploymentConfig."""

    name: str
    entrypoint: str
    description: str
    tags: list[str]
    work_pool: WorkPool
    parameters: dict[str, Any] = {}
    schedules: list[Schedule] = []
    concurrency_limit: Limit | None = None
    triggers: list[dict[str, Any]] = []

    @property
    def flow(self) -> "Flow[..., Any]":
        """The flow that the entrypoint names."""
        module, _, function = self.entrypoint.rpartition(".")
        return getattr(importlib.import_module(module), function)


class PrefectFile(Strict):
    """The whole file."""

    name: str
    definitions: dict[str, Any]
    pull: list[dict[str, dict[str, str]]]
    deployments: list[Deployment]


@pytest.fixture(scope="module")
def text() -> str:
    return SHIPPED.read_text("utf-8")


@pytest.fixture(scope="module")
def deployments(text: str) -> dict[str, Deployment]:
    loaded = PrefectFile.model_validate(yaml.safe_load(text)).deployments
    return {f"{deployment.flow.name}/{deployment.name}": deployment for deployment in loaded}


def test_the_file_at_the_root_is_the_shipped_one(text: str) -> None:
    assert (ROOT / "prefect.yaml").read_text("utf-8") == text


def test_every_deployment_is_there_on_its_pool(deployments: dict[str, Deployment]) -> None:
    assert {name: deployment.work_pool.name for name, deployment in deployments.items()} == {
        "retrain/nightly": "cpu",
        "retrain/on-demand": "cpu",
        "prepare/cpu": "cpu",
        "train/gpu": "gpu",
        "publish/gpu": "gpu",
        "promote/on-approval": "cpu",
        "rollback/on-demand": "cpu",
    }


def test_entrypoints_have_a_name_that_no_user_has(deployments: dict[str, Deployment]) -> None:
    """Prefect puts the user's folder first on a run's path, and `flows` is a name that users have too."""
    for deployment in deployments.values():
        assert deployment.entrypoint == f"sft_cli.deployments.{deployment.flow.name}"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("concurrency_limit: *one", "concurency_limit: *one"),
        ("work_pool: *gpu", "workpool: *gpu"),
        ("active: false", "active: true"),
        ("slug: nightly, ", ""),
        ("timezone: Etc/UTC", "timezone: Etc/Moon"),
        ("0 3 * * *", "0 3 * *"),
        ("ENQUEUE", "CANCEL_NEW"),
        ("grace_period_seconds", "grace_seconds"),
    ],
)
def test_a_typo_is_found(text: str, right: str, wrong: str) -> None:
    assert right in text
    with pytest.raises((ValidationError, LookupError)):
        PrefectFile.model_validate(yaml.safe_load(text.replace(right, wrong)))


def test_prefect_knows_every_key(deployments: dict[str, Deployment]) -> None:
    assert set(Deployment.model_fields) <= set(DeploymentConfig.model_fields)
    assert set(Schedule.model_fields) <= set(RawScheduleConfig.model_fields)
    for deployment in deployments.values():
        for trigger in deployment.triggers:
            read = TypeAdapter(DeploymentTriggerTypes).validate_python(trigger)
            assert set(trigger) <= set(type(read).model_fields)


def test_parameters_are_the_flows_own_and_fit_its_schema(deployments: dict[str, Deployment]) -> None:
    for deployment in deployments.values():
        schema = deployment.flow.parameters.model_dump()
        for parameters in (deployment.parameters, *(s.parameters for s in deployment.schedules)):
            assert set(parameters) <= set(inspect.signature(deployment.flow.fn).parameters)
            jsonschema.validate(parameters, {**schema, "required": []})
        for trigger in deployment.triggers:
            required = set(schema.get("required", ()))
            assert required <= set(trigger["parameters"]) <= set(schema["properties"])
        if deployment.schedules:
            assert set(schema["required"]) <= set(deployment.parameters)


def test_the_parts_that_recipes_hand_over_to_are_deployed(deployments: dict[str, Deployment]) -> None:
    """retrain passes exactly these two parameters to a part."""
    for name in ("prepare/cpu", "train/gpu", "publish/gpu"):
        assert set(inspect.signature(deployments[name].flow.fn).parameters) == {"recipe", "plan"}


def test_the_pull_step_names_the_workers_folder_and_not_this_one(text: str) -> None:
    assert yaml.safe_load(text)["pull"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $SFT_PROJECT_DIR }}"}}
    ]
