"""A small Hub on this machine: the requests that huggingface_hub makes for a push without Xet, and what it keeps of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_stand_in"
_LARGE = (".safetensors", ".pth", "tokenizer.json")


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """`repositories`: name -> branch -> path -> content. `failures`: a piece of a request's path -> the status that it gets."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256, committed or not
    requests: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    damaged: str = ""  # a path that arrives as something else
    ignored: str = ""  # a path that a .gitignore of the repository names

    def uploads(self) -> int:
        return sum(request.startswith("PUT /large/") for request in self.requests)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, str]:
        """(status, JSON, X-Error-Code)."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, ""
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            self.repositories[name] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
            if told.get("private") or told.get("visibility") == "private":
                self.private.add(name)
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": "1"}, ""
        if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            self.large[match[1]] = body
            return 200, {}, ""
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.address}/large/{one['oid']}"}}
                objects.append(one if one["oid"] in self.large else {**one, "actions": upload})
            return 200, {"transfer": "basic", "objects": objects}, ""
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|tree|branch|revision)/(.+))?", path)
        if match is None:
            return 404, {"error": f"no {path}"}, ""
        name, what, revision = match[1], match[2], unquote(match[3] or "main")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        branches = self.repositories[name]
        if what == "branch":
            branches[revision] = dict(branches["main"])
            return 200, {}, ""
        if revision == "c" * 40:
            revision = self.commits[-1]["branch"]
        if revision not in branches:
            return 404, {"error": "Revision not found"}, "RevisionNotFound"
        if what == "preupload":
            return 200, {"files": [self._mode(one, branches[revision]) for one in json.loads(body)["files"]]}, ""
        if what == "commit":
            self._commit(branches[revision], revision, body)
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}, ""
        if what == "tree":
            return 200, [self._entry(path, data) for path, data in sorted(branches[revision].items())], ""
        return 200, {"id": name, "sha": "c" * 40, "private": name in self.private, "tags": [], "siblings": []}, ""

    def _mode(self, one: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        is_large = one["path"].endswith(_LARGE)
        told = {"path": one["path"], "uploadMode": "lfs" if is_large else "regular"}
        content = files.get(one["path"])
        oid = None if content is None else hashlib.sha256(content).hexdigest() if is_large else git_id(content)
        return {**told, "shouldIgnore": one["path"] == self.ignored, "oid": oid}

    def _commit(self, files: dict[str, bytes], branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        changes = {}
        for line in lines[1:]:
            told = line["value"]
            content = base64.b64decode(told["content"]) if line["key"] == "file" else self.large[told["oid"]]
            changes[told["path"]] = content if told["path"] != self.damaged else b"damaged" + content
        files.update(changes)
        self.commits.append({**lines[0]["value"], "branch": branch, "paths": sorted(changes)})

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            status, told, code = 401, {"error": "Invalid credentials in Authorization header"}, ""
            if self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/large/"):
                failed = next((status for piece, status in hub.failures.items() if piece in path), None)
                status, told, code = (
                    (failed, {"error": "as planned"}, "") if failed else hub.answer(self.command, path, body)
                )
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One that huggingface_hub takes for the real one, with a token that it accepts."""
    with running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
