"""A Hub on loopback: what huggingface_hub asks when it makes a repository, commits to it and downloads from it.

State is plain dicts, so that a test can look at it: a repository has branches and commits, a commit is its files.
Files that end in .safetensors take the way of large files (LFS batch, PUT, verify), as on the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

MAY = {"hf_writer": {"org"}, "hf_reader": set()}
"""Token -> namespaces that it may write to."""
Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        described = repr((self.branches.get(branch), sorted(files.items()), message))
        sha = hashlib.sha1(described.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class StandInHub:
    """Use as a context manager; `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}
        """Uploaded large files by sha256, of a commit or not."""
        self.requests: list[str] = []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        """(method, path) -> HTTP status to answer instead, or 0 to break the connection."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer = (status, headers, {"error": message, **more})


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.fault(self.command, path)
        if fault == 0:
            self.close_connection = True
            return
        try:
            if fault is not None:
                raise _Refused(fault, message="on purpose")
            status, headers, content = self._route(path)
        except _Refused as refused:
            status, headers, content = refused.answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *_: Any) -> None:
        pass

    def _route(self, path: str) -> tuple[int, dict[str, str], Any]:
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("HEAD", r"/", lambda: {}),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/([0-9a-f]{64})", self._put),
            ("POST", r"/verify", self._verify),
        ]
        for method, pattern, found in routes:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                return 200, {}, found(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        raise _Refused(404, message=f"no route {self.command} {path}")

    def _json(self) -> Any:
        return json.loads(self.body)

    def _token(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if given is not None and given not in MAY:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return given

    def _writing(self, repo_id: str) -> None:
        token = self._token()
        if token is None:
            raise _Refused(401, message="Invalid username or password.")
        if repo_id.split("/")[0] not in MAY[token]:
            raise _Refused(403, message=f"You don't have the rights to write to {repo_id}")

    def _repository(self, repo_id: str) -> Repository:
        token, found = self._token(), self.hub.repositories.get(repo_id)
        if found is None or (found.private and token is None):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, repo_id: str, revision: str | None) -> tuple[str, Files]:
        repository = self._repository(repo_id)
        sha = repository.branches.get(revision or "main", revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha, repository.commits[sha]

    def _create(self) -> Any:
        asked = self._json()
        repo_id = f"{asked.get('organization') or 'org'}/{asked['name']}"
        self._writing(repo_id)
        if repo_id in self.hub.repositories:
            raise _Refused(409, message="You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = self.hub.repositories[repo_id] = Repository(private)
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def _validate(self) -> Any:
        card = self._json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        if not (match and isinstance(yaml.safe_load(match[1]), dict)):
            raise _Refused(400, message="no metadata")
        return {"errors": [], "warnings": []}

    def _branch(self, repo_id: str, branch: str) -> Any:
        self._writing(repo_id)
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def _info(self, repo_id: str, revision: str | None) -> Any:
        sha, files = self._files(repo_id, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {"id": repo_id, "sha": sha, "siblings": siblings, "private": self.hub.repositories[repo_id].private}

    def _tree(self, repo_id: str, revision: str) -> Any:
        _, files = self._files(repo_id, revision)
        return [_entry(name, content) for name, content in sorted(files.items())]

    def _preupload(self, repo_id: str, revision: str) -> Any:
        self._writing(repo_id)
        _, files = self._files(repo_id, revision)
        ask = [file["path"] for file in self._json()["files"]]
        large = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in ask}
        oids = {name: _etag(_entry(name, files[name])) for name in ask if name in files}
        answer = [{"path": n, "uploadMode": large[n], "shouldIgnore": False, "oid": oids.get(n)} for n in ask]
        return {"files": answer}

    def _batch(self, repo_id: str) -> Any:
        self._writing(repo_id)
        objects = []
        for wanted in self._json()["objects"]:
            put = {"href": f"{self.hub.url}/large/{wanted['oid']}"}
            actions = {"upload": put, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.large else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="content does not match its hash")
        self.hub.large[oid] = self.body
        return {}

    def _verify(self) -> Any:
        asked = self._json()
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, message="not uploaded")
        return {}

    def _commit(self, repo_id: str, branch: str) -> Any:
        self._writing(repo_id)
        parent, files = self._files(repo_id, branch)
        files, message = dict(files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, message="large file is missing")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, message=f"unknown operation {kind}")
        sha = self.hub.repositories[repo_id].commit(branch, files, message)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def _resolve(self, repo_id: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        sha, files = self._files(repo_id, revision)
        if name not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        etag = _etag(_entry(name, files[name]))
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}, files[name]


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """As the Hub lists a file: `oid` is git's, of the pointer where the file is a large one."""
    size = len(content)
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    large = name.endswith(".safetensors")
    blob = pointer if large else content
    oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}} if large else {}
    return {"type": "file", "path": name, "size": size, "oid": oid, **lfs}


def _etag(entry: dict[str, Any]) -> str:
    """sha256 of a large file, git's hash of another."""
    return str(entry["lfs"]["oid"] if "lfs" in entry else entry["oid"])
