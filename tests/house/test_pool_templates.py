"""Base job templates of Docker and Kubernetes pools: the integrations' own, and what this project adds, literally."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEMPLATES = Path(__file__).parents[2] / "deploy"
FILES = sorted(TEMPLATES.glob("*/*.json"))

VARIABLES = ("variables", "properties")
MANIFEST = ("job_configuration", "job_manifest", "spec", "template", "spec")
DOCKER = {
    (*VARIABLES, "image", "default"): "sft-flows:latest",
    (*VARIABLES, "env", "default"): {"SFT_PROJECT_DIR": "/project", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    (*VARIABLES, "volumes", "default"): ["sft-project:/project"],
    (*VARIABLES, "auto_remove", "default"): True,
    (*VARIABLES, "image_pull_policy", "default"): "IfNotPresent",
}
DOCKER_GPU = {
    (*VARIABLES, "container_create_kwargs", "default"): {
        "device_requests": [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}],
        "shm_size": "16g",
    },
}
KUBERNETES = {
    (*VARIABLES, "image", "default"): "sft-flows:latest",
    (*VARIABLES, "env", "default"): {"SFT_PROJECT_DIR": "/project", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    (*VARIABLES, "finished_job_ttl", "default"): 86400,
    (*VARIABLES, "pod_watch_timeout_seconds", "default"): 600,
    (*MANIFEST, "terminationGracePeriodSeconds"): "{{ termination_grace_period_seconds }}",
    (*MANIFEST, "containers", 0, "envFrom"): [{"secretRef": {"name": "{{ env_secret }}", "optional": True}}],
}
KUBERNETES_GPU = {
    (*MANIFEST, "containers", 0, "resources", "limits", "nvidia.com/gpu"): "{{ gpu_count }}",
    (*MANIFEST, "containers", 0, "volumeMounts"): [{"name": "shm", "mountPath": "/dev/shm"}],
    (*MANIFEST, "volumes"): [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shm_size }}"}}],
    (*MANIFEST, "tolerations"): "{{ tolerations }}",
    (*MANIFEST, "nodeSelector"): "{{ node_selector }}",
}
NEW_VARIABLES = {
    "docker/cpu": set(),
    "docker/gpu": set(),
    "kubernetes/cpu": {"termination_grace_period_seconds", "env_secret"},
    "kubernetes/gpu": {
        "termination_grace_period_seconds",
        "env_secret",
        "gpu_count",
        "shm_size",
        "tolerations",
        "node_selector",
    },
}
CHANGES = {
    "docker/cpu": DOCKER,
    "docker/gpu": DOCKER | DOCKER_GPU,
    "kubernetes/cpu": KUBERNETES,
    "kubernetes/gpu": KUBERNETES | KUBERNETES_GPU,
}


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((TEMPLATES / f"{name}.json").read_text("utf-8")))


def at(values: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        values = values[key]
    return values


def integrations_own(kind: str) -> dict[str, Any]:
    """The template that `prefect work-pool get-default-base-job-template` gives."""
    module = pytest.importorskip(f"prefect_{kind}.worker", reason=f"prefect-{kind} is not installed")
    worker = {"docker": "DockerWorker", "kubernetes": "KubernetesWorker"}[kind]
    return dict(getattr(module, worker).get_default_base_job_template())


def placeholders(values: Any) -> Iterator[str]:
    if isinstance(values, dict | list):
        for inner in values.values() if isinstance(values, dict) else values:
            yield from placeholders(inner)
    elif isinstance(values, str):
        yield from re.findall(r"{{ (\w+) }}", values)


def test_all_templates_are_tested() -> None:
    assert {f"{file.parent.name}/{file.stem}" for file in FILES} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_project_adds_is_in_its_place(name: str) -> None:
    template = load(name)
    for place, value in CHANGES[name].items():
        assert at(template, place) == value, place


@pytest.mark.parametrize("name", CHANGES)
def test_every_placeholder_is_a_variable_and_every_variable_is_used(name: str) -> None:
    template = load(name)
    variables = template["variables"]["properties"]
    assert set(placeholders(template["job_configuration"])) == set(variables)
    for key in NEW_VARIABLES[name]:
        assert {"title", "description", "type", "default"} <= set(variables[key])


@pytest.mark.parametrize("name", CHANGES)
def test_the_rest_is_the_integrations_own(name: str) -> None:
    template, own = load(name), integrations_own(name.partition("/")[0])
    for place in CHANGES[name]:
        *parent, last = place
        for values in (template, own):
            at(values, tuple(parent)).pop(last, None)
    for key in NEW_VARIABLES[name]:
        assert template["variables"]["properties"].pop(key)
    assert template == own
