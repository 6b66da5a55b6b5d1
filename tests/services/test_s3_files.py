"""The store on a real S3 server: first writer wins, torn and altered bytes are seen, faults are one clear error."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_core.artifacts import Manifest
from sft_core.errors import StoreError
from sft_core.lease import hold
from sft_core.store import Store
from sft_core.store_files import StoreFiles
from tests.services.s3 import BUCKET, KEYS, S3Server, s3, s3_server  # noqa: F401 - s3 is a fixture
from tests.sft_core.manifests import manifest_of

FINGERPRINT = "cd" * 32
PART_BYTES = 5 * 2**20
"""The smallest part that S3 takes."""
BIG_BYTES, SMALL_BYTES = 100 * 2**20, 2**20
MOST_EXTRA_BYTES = 80 * 2**20
"""Four parts that are sent, four answers that are put together, and what the client copies of them."""


@pytest.fixture
def store(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:  # noqa: F811
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield Store(f"s3://{BUCKET}/{tmp_path.name}")
    monkeypatch.setattr("tempfile.tempdir", None)


def publish(store: Store, text: str = "hello") -> Manifest:
    with store.staging("pack") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        (folder / "empty").touch()
        return store.publish(folder, manifest_of(folder, FINGERPRINT))


def key(store: Store, name: str) -> str:
    return f"{store.address('pack', FINGERPRINT)}/{name}"


def test_what_one_worker_publishes_another_sees_at_once(store: Store) -> None:
    other = Store(store.url)
    assert other.find("pack", FINGERPRINT) is None
    assert other.manifests("pack") == []
    manifest = publish(store)
    assert other.find("pack", FINGERPRINT) == manifest
    assert other.manifests("pack") == [manifest]
    assert (other.local(other.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "hello"
    assert sorted(store.files.walk(store.address("pack", FINGERPRINT))) == ["empty", "manifest.json", "sub/data.txt"]


def test_a_missing_object_or_one_of_another_size_is_rebuilt(store: Store, s3: S3Server) -> None:  # noqa: F811
    publish(store)
    s3.delete(key(store, "sub/data.txt"))
    assert store.find("pack", FINGERPRINT) is None
    with pytest.raises(StoreError, match="is not in the store"):
        store.local(store.artifact("pack", FINGERPRINT))
    publish(store, "again")
    s3.put(key(store, "sub/data.txt"), b"agai")
    assert store.find("pack", FINGERPRINT) is None
    publish(store, "third")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "third"


def test_wrong_bytes_are_refused_and_not_kept(store: Store, s3: S3Server) -> None:  # noqa: F811
    publish(store)
    s3.put(key(store, "sub/data.txt"), b"jello")
    with pytest.raises(StoreError, match=r"s3://.*/sub/data.txt: its bytes are not those that were written; delete"):
        store.local(store.artifact("pack", FINGERPRINT))
    assert [p for p in store.cache.root.rglob("data.txt*") if p.is_file()] == []
    s3.put(key(store, "sub/data.txt"), b"hello")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "hello"


def test_files_that_were_sent_without_a_manifest_are_no_artifact(store: Store, s3: S3Server) -> None:  # noqa: F811
    s3.put(key(store, "sub/data.txt"), b"torn")
    assert store.find("pack", FINGERPRINT) is None
    publish(store, "whole")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "whole"


def test_of_many_that_publish_at_once_one_wins_and_its_bytes_stay(store: Store) -> None:
    texts = [f"writer {i} " * (i + 1) for i in range(4)]
    won: list[Manifest] = []
    threads = [threading.Thread(target=lambda t=t: won.append(publish(Store(store.url), t))) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(won) == 4
    assert all(manifest == won[0] for manifest in won)
    folder = store.local(store.artifact("pack", FINGERPRINT))  # checks every hash
    assert (folder / "sub" / "data.txt").read_text() in texts


def test_only_one_creates(store: Store) -> None:
    path = f"{store.files.root}/x"
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda i=i: made.append(StoreFiles(store.url).create(path, f"{i}".encode())))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(made) == [False] * 5 + [True]


def test_a_lease_is_passed_on_through_the_store(store: Store) -> None:
    folder, seen = f"{store.files.root}/lease", []
    with hold(store.files, folder, "work", seen.append) as first:
        names = store.files.names(folder)
        assert names == ["00000001.json"]
        assert json.loads(store.files.cat_file(f"{folder}/{names[0]}"))["released"] is False
        assert not first.lost
    with hold(StoreFiles(store.url), folder, "work", seen.append):
        assert store.files.names(folder) == ["00000002.json"]
    assert seen == []


def test_a_large_file_goes_in_parts_and_comes_back(store: Store, tmp_path: Path) -> None:
    """The memory of a process that sends and fetches a big file, against one that does so with a small one."""
    sizes = {size: peak_of(store, tmp_path, size) for size in (SMALL_BYTES, BIG_BYTES)}
    assert sizes[BIG_BYTES] - sizes[SMALL_BYTES] < MOST_EXTRA_BYTES < BIG_BYTES


def peak_of(store: Store, folder: Path, size: int) -> int:
    program = f"""
import sys
from pathlib import Path
from sft_core.fingerprint import hash_file
from sft_core import store_files
store_files.PART_BYTES = {PART_BYTES}
files, big, back = store_files.StoreFiles({store.url!r}), Path({str(folder)!r}, "big"), Path({str(folder)!r}, "back")
with big.open("wb") as file:
    for i in range({size} // 2**20):
        file.write(bytes([i % 251]) * 2**20)
path = files.root + "/big{size}"
files.put_file(big, path)
assert files.size(path) == {size}
files.get_file(path, str(back))
assert hash_file(back) == hash_file(big) == files.sha256(path)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024)  # ru_maxrss would begin at the peak of the process that started this one
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_bucket_that_is_not_there_is_named(s3: S3Server) -> None:  # noqa: F811
    with pytest.raises(StoreError, match=r"s3://no-bucket/x/pack/.*there is no such bucket.*store: s3://no-bucket/x"):
        Store("s3://no-bucket/x").find("pack", FINGERPRINT)


def test_other_faults_are_one_clear_error(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    nothing = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    with s3_server(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        cases = {
            "access refused (InvalidAccessKeyId: ": strict.environment,
            "no credentials (NoCredentialsError: ": {"AWS_ENDPOINT_URL": s3.endpoint},
            "the store cannot be reached (EndpointConnectionError: ": {
                **KEYS,
                "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            },
        }
        for words, settings in cases.items():
            done = subprocess.run(
                [sys.executable, "-m", "cli.main", "store", "ls", "s3://bucket/x"],
                env=nothing | settings,
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == 1
            (line,) = done.stderr.strip().splitlines()
            assert line.startswith("error: s3://bucket/x")
            assert words in line
