"""The few addresses of the Hugging Face hub that its client uses to make a repository, commit and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """Keeps what was committed; large files travel as Git LFS does, others inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        """``user/name/path`` → content."""
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.server.private[repo] = bool(wanted.get("private") or wanted.get("visibility") == "private")
            self.answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self.answer(404, {"error": path})

    def commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[f"{repo}/{value['path']}"] = self.server.objects[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        self.server.objects[self.path.removeprefix("/lfs/")] = self.body()
        self.answer(200)

    def do_GET(self) -> None:
        repo, _, file = self.path.lstrip("/").partition("/resolve/main/")
        content = self.server.files.get(f"{repo}/{file}")
        if content is None:
            code = "EntryNotFound" if any(f.startswith(f"{repo}/") for f in self.server.files) else "RepoNotFound"
            self.answer(404, {"error": code}, X_Error_Code=code)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, X_Linked_Etag=etag)

    do_HEAD = do_GET


def mode(path: str) -> str:
    return "lfs" if path.endswith(".pth") else "regular"


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub on this machine while the context is open."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
