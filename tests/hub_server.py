"""A Hugging Face Hub on the loopback interface: as much of its HTTP API as the real client needs to
push and to load.

Large files go by LFS (basic transfer, one PUT each); the server has no Xet, so clients need
`HF_HUB_DISABLE_XET=1`. It counts what arrives, and can answer with errors, cut connections, or hold
an upload.
"""

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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "TestTokenThatMustNotLeak0123456789"
USER = "radiology"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png")
SIGNATURE = "X-Amz-Signature=secret-of-the-upload"
REPO_PATH = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.*))?)?")
FILE_PATH = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)")
BATCH_PATH = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
# From the Hub's own answer to an unknown licence.
LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "other"}
LICENCE_ID = re.compile(r"[a-z0-9.-]+")


@dataclass
class Repo:
    """A repository: its files by branch, and its commits' messages."""

    kind: str
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def head(self, branch: str) -> str:
        """Return the commit of a branch: a digest of its files."""
        files = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps([branch, files]).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or of a branch's commit."""
        return next((f for name, f in self.branches.items() if revision in (name, self.head(name))), None)


@dataclass
class HubState:
    """What the Hub holds, what happened, and what shall go wrong.

    Attributes:
        repos: by (models or datasets, id).
        objects: LFS objects by SHA-256.
        requests: method and path of all requests, in order.
        uploads: SHA-256 of every object that arrived whole.
        faults: by method and start of the path: status and server message, or "cut" to break the
            connection.
        repeats: how often each fault happens; without an entry, always.
        hold: SHA-256 of objects whose upload stops half way until `released`.
        always_public: a server that knows no private repositories.
        leaks: requests to upload addresses that carried a token.
    """

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    faults: dict[tuple[str, str], tuple[int, str] | str] = field(default_factory=dict)
    repeats: dict[tuple[str, str], int] = field(default_factory=dict)
    hold: set[str] = field(default_factory=set)
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    always_public: bool = False
    leaks: list[str] = field(default_factory=list)
    endpoint: str = ""

    def model(self, repo_id: str) -> dict[str, bytes]:
        """Return the files on a model's main branch."""
        return self.repos["models", repo_id].branches["main"]

    def dataset(self, repo_id: str) -> dict[str, bytes]:
        """Return the files on a dataset's main branch."""
        return self.repos["datasets", repo_id].branches["main"]

    def count(self, method: str, part: str) -> int:
        """Return how many requests had this method and this in their path."""
        return sum(one == method and part in path for one, path in self.requests)

    def fault(self, method: str, path: str) -> tuple[int, str] | str | None:
        """Return what shall go wrong with a request, and count it."""
        for key, fault in self.faults.items():
            if key[0] == method and path.startswith(key[1]) and self.repeats.get(key, 1) > 0:
                if key in self.repeats:
                    self.repeats[key] -= 1
                return fault
        return None


@contextmanager
def running_hub() -> Iterator[HubState]:
    """Serve an empty Hub; `endpoint` of the yielded state is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.state = HubState(endpoint=f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.state  # type: ignore[attr-defined]
    finally:
        server.state.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        thread.join()


def git_hash(data: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Answer(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str, code: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> HubState:
        return self.server.state  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        fault = self.state.fault(self.command, path)
        try:
            if fault == "cut":
                self._cut()
                return
            body = self._body(path)
            if isinstance(fault, tuple):
                raise _Answer(fault[0], fault[1].replace("ECHO", self.headers.get("Authorization") or ""))
            self._route(path, body)
        except _Answer as answer:
            headers = {"X-Error-Message": answer.message, **({"X-Error-Code": answer.code} if answer.code else {})}
            self._json(answer.body or {"error": answer.message}, answer.status, headers)
        except ConnectionError:
            self.close_connection = True

    def _body(self, path: str) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        first = self.rfile.read(length // 2)
        if self.command == "PUT" and path.rsplit("/", 1)[-1] in self.state.hold:
            self.state.held.set()
            self.state.released.wait(60)
        return first + self.rfile.read(length - length // 2)

    def _cut(self) -> None:
        """Read half of the request and hang up."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.close_connection = True
        self.connection.close()

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Answer(401, "Invalid credentials in Authorization header")

    def _route(self, path: str, body: bytes) -> None:
        if path.startswith("/lfs/"):
            self._large_file(path, body)
            return
        self._require_token()
        if path == "/api/whoami-v2":
            self._json({"type": "user", "name": USER, "orgs": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif found := BATCH_PATH.fullmatch(path):
            self._batch(json.loads(body))
        elif found := FILE_PATH.fullmatch(path):
            self._resolve(self._repo(found[1] or "models", found[2]), found[3], found[4])
        elif found := REPO_PATH.fullmatch(path):
            self._repo_request(found[1], found[2], found[3] or "", found[4] or "", body)
        else:
            raise _Answer(404, f"no such route: {self.command} {path}")

    def _repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.state.repos:
            raise _Answer(404, "Repository not found", "RepoNotFound")
        return self.state.repos[kind, repo_id]

    def _files(self, repo: Repo, revision: str) -> dict[str, bytes]:
        files = repo.files(revision)
        if files is None:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    def _create(self, asked: dict[str, Any]) -> None:
        namespace, kind = asked.get("organization") or USER, f"{asked.get('type', 'model')}s"
        if namespace != USER:
            raise _Answer(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace}")
        repo_id = f"{namespace}/{asked['name']}"
        if (kind, repo_id) in self.state.repos:
            raise _Answer(409, "You already created this repo")
        private = asked.get("visibility") == "private" and not self.state.always_public
        self.state.repos[kind, repo_id] = Repo(kind, private)
        prefix = "datasets/" if kind == "datasets" else ""
        self._json({"url": f"{self.state.endpoint}/{prefix}{repo_id}", "name": repo_id})

    def _validate(self, asked: dict[str, Any]) -> None:
        parts = asked["content"].split("---\n")
        metadata = yaml.safe_load(parts[1]) if asked["content"].startswith("---\n") else {}
        errors = []
        if metadata.get("license", "other") not in LICENCES:
            errors.append(f'"license" must be one of {sorted(LICENCES)}')
        if not LICENCE_ID.fullmatch(str(metadata.get("license_name", "none"))):
            errors.append('"license_name" must be an id in small letters')
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(metadata.get("base_model", "none"))):
            errors.append('"base_model" is not a model id')
        if errors:
            raise _Answer(400, "Invalid metadata", body={"errors": [{"message": text} for text in errors]})
        self._json({"errors": [], "warnings": [] if metadata else [{"message": f"no metadata ({TOKEN})"}]})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            href = f"{self.state.endpoint}/lfs/objects/{one['oid']}?{SIGNATURE}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.state.endpoint}/lfs/verify"}}
            objects.append({**one, **({} if one["oid"] in self.state.objects else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _large_file(self, path: str, body: bytes) -> None:
        if path == "/lfs/verify":
            asked = json.loads(body)
            if len(self.state.objects.get(asked["oid"], b"")) != asked["size"]:
                raise _Answer(404, "the object has not arrived")
            self._json({})
            return
        if self.headers.get("Authorization"):
            self.state.leaks.append(path)
        oid = path.rsplit("/", 1)[-1]
        if sha256(body) != oid:
            raise _Answer(400, "the object's SHA-256 is another")
        self.state.objects[oid] = body
        self.state.uploads.append(oid)
        self._send(b"", 200, {})

    def _repo_request(self, kind: str, repo_id: str, action: str, rest: str, body: bytes) -> None:
        repo = self._repo(kind, repo_id)
        if action in ("", "revision"):
            self._info(repo, repo_id, rest or "main")
        elif action == "tree":
            self._json(self._listing(self._files(repo, rest.split("/")[0])))
        elif action == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self._json([entry for entry in self._listing(self._files(repo, rest)) if entry["path"] in wanted])
        elif action == "preupload":
            self._preupload(self._files(repo, rest), json.loads(body))
        elif action == "branch":
            repo.branches[rest] = dict(repo.branches["main"])
            self._json({})
        elif action == "commit":
            self._commit(repo, repo_id, rest, [json.loads(line) for line in body.splitlines()])
        else:
            raise _Answer(404, f"no such action: {action}")

    def _info(self, repo: Repo, repo_id: str, revision: str) -> None:
        files = self._files(repo, revision)
        branch = next(name for name, candidate in repo.branches.items() if candidate is files)
        siblings = [{"rfilename": path} for path in sorted(files)]
        about = {"_id": "1", "id": repo_id, "modelId": repo_id, "private": repo.private, "sha": repo.head(branch)}
        self._json({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _listing(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for path, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path.endswith(LFS_SUFFIXES):
                entry |= {"oid": "1" * 40, "lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}}
            entries.append(entry)
        return entries

    def _preupload(self, files: dict[str, bytes], asked: dict[str, Any]) -> None:
        ignored = files.get(".gitignore", b"").decode().split()
        answers = []
        for one in asked["files"]:
            large = one["path"].endswith(LFS_SUFFIXES)
            there = files.get(one["path"])
            oid = None if there is None else sha256(there) if large else git_hash(there)
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": one["path"] in ignored, "oid": oid}
            )
        self._json({"files": answers})

    def _commit(self, repo: Repo, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self._files(repo, branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.objects:
                    raise _Answer(400, f"LFS pointer points to a file that does not exist: {value['path']}")
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Answer(400, f"unknown operation {line['key']}")
        repo.branches[branch] = files
        repo.commits.append(lines[0]["value"]["summary"])
        url = f"{self.state.endpoint}/{repo_id}/commit/{repo.head(branch)}"
        self._json({"success": True, "commitUrl": url, "commitOid": repo.head(branch), "pullRequestUrl": None})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        branch = next(name for name, candidate in repo.branches.items() if candidate is files)
        commit = {"X-Repo-Commit": repo.head(branch)}
        if path not in files:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        tag = sha256(files[path]) if path.endswith(LFS_SUFFIXES) else git_hash(files[path])
        self._send(files[path], 200, {**commit, "ETag": f'"{tag}"'})
