"""A hub on loopback: what the clients of huggingface_hub and datasets ask for, served from folders.

`HF_ENDPOINT` at its address makes them talk to it. Below `root`: `models/OWNER/NAME/COMMIT/...` and `datasets/...`; the
branch `main` of a repository is the commit that `set_main` names. A token is asked for by `gated` repositories.
The routes are those of https://huggingface.co/docs/hub/api.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Serves `root`; `asked` has a line (method and path) for each request."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self._main: dict[str, str] = {}

    def set_main(self, kind: str, repository: str, commit: str) -> Path:
        """The folder of a new commit, which the branch `main` names from now on."""
        self._main[f"{kind}/{repository}"] = commit
        folder = self.root / kind / repository / commit
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit_of(self, kind: str, repository: str, revision: str) -> str | None:
        """The commit that a branch or a commit names, or None."""
        commit = self._main.get(f"{kind}/{repository}") if revision == "main" else revision
        return commit if commit and (self.root / kind / repository / commit).is_dir() else None


@contextmanager
def hub(root: Path) -> Iterator[Hub]:
    """A hub that serves until the end of the block."""
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := FILE.fullmatch(path):
            self._file("datasets" if found[1] else "models", found[2], found[3], found[4])
        elif found := API.fullmatch(path):
            self._api(*found.groups())
        else:
            self._answer(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"]))
        found = API.fullmatch(path)
        if path == "/api/repos/create":
            name = json.loads(body)
            repository = f"{name.get('organization') or 'me'}/{name['name']}"
            if self._known("models", repository, write=True):
                self._answer(200, {"url": f"{self.server.url}/{repository}", "name": repository})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found is None:
            self._answer(404, {"error": "not found"})
        elif not self._known(found[1], found[2], write=True):
            pass  # answered
        elif found[3] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif found[3] == "commit":
            self._commit(found[1], found[2], body)
        else:
            self._answer(404, {"error": "not found"})

    def _commit(self, kind: str, repository: str, body: bytes) -> None:
        commit = hashlib.sha1(body).hexdigest()
        folder = self.server.set_main(kind, repository, commit)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.server.url}/{repository}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def _api(self, kind: str, repository: str, what: str | None, revision: str | None, rest: str | None) -> None:
        if not self._known(kind, repository):
            return
        commit = self.server.commit_of(kind, repository, revision or "main")
        if commit is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        elif what in (None, "revision"):
            names = [{"rfilename": entry["path"]} for entry in self._entries(kind, repository, commit)]
            self._answer(200, {"id": repository, "sha": commit, "siblings": names, "private": False, "tags": []})
        elif what == "tree":
            prefix = f"{rest}/" if rest else ""
            found = [e for e in self._entries(kind, repository, commit) if str(e["path"]).startswith(prefix)]
            self._answer(200, found)
        else:
            self._answer(404, {"error": "not found"})

    def _entries(self, kind: str, repository: str, commit: str) -> list[dict[str, Any]]:
        folder = self.server.root / kind / repository / commit
        return [
            {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": _etag(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        ]

    def _file(self, kind: str, repository: str, revision: str, name: str) -> None:
        if not self._known(kind, repository):
            return
        commit = self.server.commit_of(kind, repository, revision)
        if commit is None:
            self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        path = self.server.root / kind / repository / commit / name
        if not path.is_file():
            self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self._answer(200, path.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"'})

    def _known(self, kind: str, repository: str, write: bool = False) -> bool:
        """False, and answered, if it is not there or not for who asks."""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if (write or repository in self.server.gated) and not allowed:
            code = {"X-Error-Code": "GatedRepo"} if repository in self.server.gated else {}
            self._answer(401, {"error": "Invalid credentials"}, code)
            return False
        if not write and not (self.server.root / kind / repository).is_dir():
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        return True

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        first, last = 0, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted:
            first, last = int(wanted[1]), min(last, int(wanted[2] or last - 1) + 1)
            status, headers = 206, {**(headers or {}), "Content-Range": f"bytes {first}-{last - 1}/{len(data)}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(last - first), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[first:last])

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
