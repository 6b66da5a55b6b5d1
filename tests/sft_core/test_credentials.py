"""Secrets of URLs: told from addresses without any, and out of all that leaves a process."""

import io
import logging
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from sft_core.credentials import credentials_hidden, holds_credential, without_credentials
from sft_core.errors import SftError, StoreError

ROOT = Path(__file__).parents[2]
SECONDS = 300
SECRET = {
    # before the host
    "https://me:swordfish@host/rows.jsonl": "https://***@host/rows.jsonl",
    "HTTPS://me:swordfish@host": "HTTPS://***@host",
    "https://:swordfish@host/": "https://***@host/",
    "https://swordfish@host/x": "https://***@host/x",
    "https://swordfish:@host/x": "https://***@host/x",
    "https://swordfish:x-oauth-basic@github.com/me/r": "https://***@github.com/me/r",
    "https://me:sword@fish@host/x": "https://***@host/x",
    "https://me:sword%40fish@host/x": "https://***@host/x",
    "https://me:sword/fish@host/x": "https://***@host/x",
    "https://me:sword?fish@host/x": "https://***@host/x",
    "https://me:sword#fish@host/x": "https://***@host/x",
    "https://me:1234@host/x": "https://***@host/x",
    "https://me:1234/5678@host.example.org/x": "https://***@host.example.org/x",
    "http://me:swordfish@[::1]:8080/x": "http://***@[::1]:8080/x",
    "s3://AKIA:swordfish@bucket/rows": "s3://***@bucket/rows",
    "s3://AKIA:123/abc@bucket/rows": "s3://***@bucket/rows",
    "s3://AKIA:sword/fi+sh@bucket/rows": "s3://***@bucket/rows",
    "gs://swordfish@bucket/rows": "gs://***@bucket/rows",
    "simplecache::s3://AKIA:sword/fish@bucket/rows": "simplecache::s3://***@bucket/rows",
    "zip://a.jsonl::https://me:swordfish@host/a.zip": "zip://a.jsonl::https://***@host/a.zip",
    "abfs://box:swordfish@account.dfs.core.windows.net/x": "abfs://***@account.dfs.core.windows.net/x",
    "sftp://me:swordfish@host/rows": "sftp://***@host/rows",
    "postgresql+psycopg2://sft:swordfish@db:5432/mlflow": "postgresql+psycopg2://***@db:5432/mlflow",
    "redis://:swordfish@cache:6379/0": "redis://***@cache:6379/0",
    "git+https://swordfish@github.com/me/r.git": "git+https://***@github.com/me/r.git",
    "ssh://ghp_abcdefghijklmnopqrstuvwx@host/r": "ssh://***@host/r",
    # in the query, the fragment, the path
    "https://host/x?key=swordfish": "https://host/x?key=***",
    "https://host/x?page=2&sig=swordfish&z=1": "https://host/x?page=2&sig=***&z=1",
    "https://a.blob.core.windows.net/c/b?sv=2022&sp=r&sig=sword%2Ffish": (
        "https://a.blob.core.windows.net/c/b?sv=2022&sp=r&sig=***"
    ),
    "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=swordfish": (
        "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=***"
    ),
    "https://host/x?X%2DAmz%2DSignature=swordfish": "https://host/x?X%2DAmz%2DSignature=***",
    "https://host/x?X-Goog-Signature=swordfish": "https://host/x?X-Goog-Signature=***",
    "https://host/x?AWSAccessKeyId=swordfish": "https://host/x?AWSAccessKeyId=***",
    "https://host/x?access_token=swordfish": "https://host/x?access_token=***",
    "https://host/x?private-token=swordfish": "https://host/x?private-token=***",
    "https://host/x?a=1;password=swordfish": "https://host/x?a=1;password=***",
    "https://host/x?API-KEY=swordfish": "https://host/x?API-KEY=***",
    "https://host/x?subscription-key=swordfish": "https://host/x?subscription-key=***",
    "jdbc:postgresql://db/mlflow?user=sft&password=swordfish": "jdbc:postgresql://db/mlflow?user=sft&password=***",
    "abfs://box/rows?sig=swordfish": "abfs://box/rows?sig=***",
    "https://host/x#access_token=swordfish": "https://host/x#access_token=***",
    "https://host/x?a=1#b=2&token=swordfish": "https://host/x?a=1#b=2&token=***",
    "https://host/x#eyJhbGciOiJI.eyJzdWIiOiIx.abc": "https://host/x#***",
    "https://host/hf_abcdefghijklmnopqrstuvwx/rows": "https://host/***/rows",
    "https://proxy/get?url=https%3A%2F%2Fme%3Aswordfish%40host": "https://proxy/get?url=***",
}
PLAIN = [
    "s3://bucket/rows.jsonl",
    "s3://bucket/key@v1.jsonl",
    "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/rows@v1",
    "s3a://bucket",
    "gs://bucket/a/b/*.parquet",
    "abfs://container@account.dfs.core.windows.net/rows",
    "abfss://container@account.dfs.core.windows.net/rows",
    "wasbs://container@account.blob.core.windows.net/rows",
    "hf://datasets/user/repo@main/rows.jsonl",
    "hdfs://me@namenode:8020/rows",
    "sftp://me@host/rows",
    "ssh://git@github.com/me/r.git",
    "git@github.com:me/r.git",
    "https://host/rows.jsonl",
    "https://host:8080/data@v2.jsonl",
    "http://minio:9000/bucket/a@b.json",
    "http://hub:8080/datasets/x@main/rows",
    "http://[::1]:8080/a@b",
    "https://host/@scope/package",
    "https://host/rows.jsonl?version=3",
    "https://host/x?sort_key=name&page_token=2",
    "https://host/x?tokens=100&keyboard=1&signal=2",
    "https://host/x?author=me&passage=7",
    "https://host/x?token=",
    "https://host/x?mail=me@host",
    "https://host/x#L10-L20",
    "https://host/x#key-points",
    "https://en.wikipedia.org/wiki/Key_(cryptography)",
    "tcp://scheduler:8786",
    "sqlite:///mlflow.db",
    "sqlite+aiosqlite:////home/me/prefect.db",
    "postgresql+psycopg2://sft@db/mlflow",
    "postgresql://db:5432/mlflow",
    "file:///srv/rows@home.jsonl",
    "zip://a.jsonl::https://host/a.zip",
    "models:/orders@champion",
    "runs:/0123/verdict.md",
    "C:\\rows@home.jsonl",
    "https://***@host/x?sig=***",
    "timdettmers/openassistant-guanaco",
    "me:swordfish@host is no URL",
]


@pytest.mark.parametrize("url", SECRET)
def test_a_secret_is_found_and_hidden(url: str) -> None:
    assert holds_credential(url)
    assert without_credentials(url) == SECRET[url]
    said = f"GET ({url}): refused, '{url}'. See https://docs.example.org/x?y=1."
    assert "swordfish" not in without_credentials(said)
    assert without_credentials(said).endswith("'. See https://docs.example.org/x?y=1.")


@pytest.mark.parametrize("url", PLAIN)
def test_an_address_without_one_passes_unchanged(url: str) -> None:
    assert not holds_credential(url)
    said = f"GET ({url}): refused, '{url}'. See {url}."
    assert without_credentials(said) == said


def test_an_error_of_ours_never_says_one() -> None:
    error = StoreError("store s3://AKIA:swordfish@bucket: not there")
    assert (str(error), isinstance(error, SftError)) == ("store s3://***@bucket: not there", True)
    assert "swordfish" not in repr(error)


def test_a_librarys_error_and_what_led_to_it_lose_theirs() -> None:
    def fail() -> None:
        try:
            raise OSError("http://me:swordfish@host/a is away")
        except OSError as error:
            raise ValueError("GET http://me:swordfish@host/a?sig=swordfish") from error

    with pytest.raises(ValueError, match=r"GET http://\*\*\*@host/a\?sig=\*\*\*") as caught, credentials_hidden():
        fail()
    assert "http://***@host/a is away" in "".join(traceback.format_exception(caught.value))
    assert "swordfish" not in repr(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


LOGS = """
import logging, sys
import {module}
logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
log = logging.getLogger("httpx")
log.info("HTTP Request: %s %s", "GET", "https://me:swordfish@host/x?sig=swordfish")
log.info("%s of %d rows from %s", "3", 7, "s3://bucket/rows")
try:
    raise RuntimeError("postgresql://sft:swordfish@db/mlflow is away")
except RuntimeError:
    log.exception("failed")
"""


@pytest.mark.parametrize("module", ["sft_cli", "flows"])
def test_what_a_process_of_ours_logs_holds_none(tmp_path: Path, module: str) -> None:
    """Records of any library, tracebacks too: in the command's process, and in a flow run's of a worker."""
    done = subprocess.run(
        [sys.executable, "-c", LOGS.format(module=module)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "swordfish" not in done.stdout + done.stderr
    assert "HTTP Request: GET https://***@host/x?sig=***" in done.stdout
    assert "3 of 7 rows from s3://bucket/rows" in done.stdout
    assert "RuntimeError: postgresql://***@db/mlflow is away" in done.stdout


class OwnTraceback(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.getMessage()}\n{record.exc_info[1]!r}" if record.exc_info else record.getMessage()


def test_a_formatter_of_ones_own_gets_none_either() -> None:
    from sft_core.credentials import hide_in_logs

    before, out = logging.getLogRecordFactory(), io.StringIO()
    try:
        hide_in_logs()
        handler = logging.StreamHandler(out)
        handler.setFormatter(logging.Formatter("%(levelname)s|%(message)s"))
        log = logging.Logger("mine")
        log.addHandler(handler)
        log.error({"url": "https://me:swordfish@host"})
        handler.setFormatter(OwnTraceback("%(message)s"))
        try:
            raise OSError("https://me:swordfish@host is away")
        except OSError:
            log.exception("failed")
    finally:
        logging.setLogRecordFactory(before)
    assert out.getvalue() == "ERROR|{'url': 'https://***@host'}\nfailed\nOSError('https://***@host is away')\n"
