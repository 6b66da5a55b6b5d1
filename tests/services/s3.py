"""An S3 server on loopback: moto's, a process of its own that is stopped by its pid.

moto (PyPI) was chosen because it heeds `If-None-Match`, speaks multipart uploads, answers with S3's own error codes,
and can check signatures. s3rver (npm) does not know conditional writes and is no longer kept; Debian has no other
S3 server than Ceph's, which needs a cluster.
"""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.servers import HOST, Process, free_port, start

s3fs = pytest.importorskip("s3fs", reason="pip install -e '.[dev]' brings s3fs and moto")
BUCKET = "bucket"
START_SECONDS = 120.0
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """A running server. `environment` is what a process needs to reach it."""

    def __init__(self, process: Process, port: int) -> None:
        self.process, self.endpoint = process, f"http://{HOST}:{port}"
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    def client(self) -> Any:
        """boto3's client: what a person with the keys could do to the bucket."""
        import boto3  # comes with moto

        return boto3.client("s3", endpoint_url=self.endpoint)

    def put(self, path: str, body: bytes) -> None:
        """Write an object; `path` is BUCKET/key."""
        bucket, _, name = path.partition("/")
        self.client().put_object(Bucket=bucket, Key=name, Body=body)

    def delete(self, path: str) -> None:
        """Remove an object."""
        bucket, _, name = path.partition("/")
        self.client().delete_object(Bucket=bucket, Key=name)


@contextmanager
def s3_server(folder: Path, **settings: str) -> Iterator[S3Server]:
    """Start a server with one empty bucket; its log goes to `folder`."""
    port = free_port()
    environment = {**os.environ, **KEYS, **settings}
    process = start("s3", ["moto.server", "-H", HOST, "-p", str(port)], folder, environment)
    server = S3Server(process, port)
    try:
        _await(server)
        yield server
    finally:
        process.stop()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for a test file, reachable from this process too."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.client().create_bucket(Bucket=BUCKET)
        s3fs.S3FileSystem.clear_instance_cache()  # of an earlier file's server, which is gone
        yield server


def _await(server: S3Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.process.running and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(server.endpoint, timeout=60).close()
        except urllib.error.HTTPError:
            return  # it answers, and wants keys
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no S3 server within {START_SECONDS:.0f} s: {server.process.log.read_text()[-2000:]}")
