"""docker-compose.yaml: no secret in it, nothing open to the world, the pools and deployments of prefect.yaml."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SECRET = re.compile("PASSWORD|SECRET|TOKEN|ACCESS_KEY|ROOT_USER")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yaml").read_text("utf-8")


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text)["services"])


def test_the_services(services: dict[str, Any]) -> None:
    assert set(services) == {
        "postgres",
        "s3",
        "buckets",
        "prefect",
        "mlflow",
        "register",
        "worker-cpu",
        "worker-gpu",
    }
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)


def test_secrets_come_from_the_environment_alone(text: str, services: dict[str, Any]) -> None:
    found = 0
    for name, service in services.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                found += 1
                assert re.fullmatch(r"\$\{\w+:[?-][^}]*\}", value), (name, key)
    assert found >= 8
    for credentials in re.findall(r"://(\S+)@", text):
        assert credentials == "sft:${POSTGRES_PASSWORD}"


def test_the_example_names_every_variable_and_no_password(text: str) -> None:
    lines = (ROOT / "deploy" / "compose.env.example").read_text("utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert used - {"SFT_IMAGE"} == set(example)
    assert [key for key, value in example.items() if SECRET.search(key) and value] == []
    for required in re.findall(r"\$\{(\w+):\?", text):
        assert example[required] == ""


def test_images_are_pinned_and_ports_are_this_machines_alone(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert "${SFT_IMAGE:-sft-flows:latest}" in service["image"] or re.search(r":.*\d", service["image"]), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_workers_are_of_the_pools_and_have_time_to_save(services: dict[str, Any]) -> None:
    for pool in ("cpu", "gpu"):
        worker = services[f"worker-{pool}"]
        assert worker["command"][:5] == ["prefect", "worker", "start", "--pool", pool]
        assert worker["stop_grace_period"] == "2m"
        assert worker["environment"]["SFT_PROJECT_DIR"] == "/project"
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_the_dockerfile_copies_every_package() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    copied = {line.split()[1] for line in lines if line.startswith("COPY")}
    assert {"cli", "demo", "flows", "recipes", "sft_cli", "sft_core", "tasks", "deploy"} <= copied
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()}
    assert copied <= allowed | {"pyproject.toml"}
