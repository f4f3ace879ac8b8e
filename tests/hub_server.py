"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests with the real client libraries.

It speaks the Hub's HTTP interface as far as huggingface_hub 2.4 needs it to create repos and branches, commit (inline
and LFS
files, deletions), list, look up and download with ranges, and to stream data sets. It does not speak xet: clients run
with
HF_HUB_DISABLE_XET=1, see `Hub.environment`. As on the Hub, a private repo does not exist for who may not read it, a
large file is
redirected to another host, and what is unchanged is not committed again. Bodies are kept on disk, by their sha256.

    pytest_plugins = ["hub_server"]

    def test_push(hub, tmp_path):
        subprocess.run([...], env=hub.environment(tmp_path / "home"))
        assert "config.json" in hub.repos["someone/toy"].files()
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet", "*.tar", "*.zip")
)
LFS_SIZE = 10 * 2**20  # bytes from which every file is an LFS file
CHUNK = 2**20


@dataclass(frozen=True)
class Blob:
    """A file's content: `oid` as git has it (of the pointer, for an LFS file), its size in bytes and its sha256."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def info(self) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "oid": self.oid, "size": self.size} | lfs


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    user: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repo; `kind` is models, datasets or spaces."""

    kind: str
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str | None] = field(default_factory=lambda: {"main": None})

    def commit(self, revision: str = "main") -> Commit | None:
        """The commit of a branch or of a sha; None: there is none."""
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits, commit = [], self.commit(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return dict(self.commit(revision).files)

    def add_commit(self, branch: str, title: str, files: dict[str, Blob], description: str = "", user: str = "") -> str:
        parent = self.branches[branch]
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = sorted((path, blob.etag) for path, blob in files.items())
        oid = hashlib.sha1(repr((self.repo_id, len(self.commits), parent, title, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, user, date, files)
        self.branches[branch] = oid
        return oid


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int
    user: str | None


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.message, self.code, self.body = status, message, code, body
        self.headers = {}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def validate_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README.md, the ones the Hub has for what is tested here."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)], []
    if not isinstance(metadata, dict):
        return ["metadata has to be an object"], []
    errors = []
    for key, kinds in (("base_model", "models"), ("datasets", "datasets")):
        values = metadata.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{kinds}.')
    for model in metadata.get("model-index", []):
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            errors.append('"model-index" has to be a list of models with name and results')
            continue
        for result in model["results"]:
            if not result.get("task", {}).get("type") or not result.get("dataset", {}).get("type"):
                errors.append('"model-index" has a result without task.type or dataset.type')
            if any("type" not in m or m.get("value") is None for m in result.get("metrics", [{}])):
                errors.append('"model-index" has a metric without type or value')
    return errors, []


class Hub:
    """The server and what it holds.

    Args:
        folder: where bodies are kept.
        user: who `token` belongs to; may write in its own namespace and in `organizations`.

    Attributes:
        url: HF_ENDPOINT of the clients.
        repos: "owner/name" of a model, "datasets/owner/name" of a data set -> Repo.
        requests: every request answered so far.
    """

    def __init__(self, folder: Path, user: str = "someone", organizations: tuple[str, ...] = ("euhidaman",)):
        self.folder = folder
        folder.mkdir(parents=True)
        self.user, self.token, self.organizations = user, "hf_token_of_the_stand_in", organizations
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"  # another host, as the Hub's storage is
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment of a client process. `home`: its HF_HOME; `token`: default the right one, "" for none."""
        ours = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "120",  # seconds; a busy machine is slow, not offline
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(home),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        token = self.token if token is None else token
        return environment | ({"HF_TOKEN": token} if token else {})

    def read(self, key: str, path: str, revision: str = "main") -> bytes:
        """The content of a file of a repo."""
        return self.body(self.repos[key].files(revision)[path].sha256).read_bytes()

    def put_dataset(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to a data set, created when missing; returns the sha of the commit."""
        return self._put("datasets", repo_id, files, private)

    def put_model(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit files to a model repo, created when missing; returns the sha of the commit."""
        return self._put("models", repo_id, files, private)

    def _put(self, kind: str, repo_id: str, files: dict[str, bytes], private: bool) -> str:
        with self.lock:
            repo = self.repos.get(repo_key(kind, repo_id)) or self.create(kind, repo_id, private)
            blobs = {path: self.store(path, content) for path, content in files.items()}
            return repo.add_commit("main", "Put files", repo.files() | blobs)

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_key(kind, repo_id)] = Repo(kind, repo_id, private)
        repo.add_commit(
            "main", "initial commit", {".gitattributes": self.store(".gitattributes", GITATTRIBUTES.encode())}
        )
        return repo

    def body(self, sha256: str) -> Path:
        return self.folder / sha256

    def store(self, path: str, content: bytes) -> Blob:
        """Keep a content; `path` and size decide whether it is an LFS file."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.body(sha256).exists():
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(content)
            os.replace(file.name, self.body(sha256))
        if is_lfs(path, len(content)):
            return lfs_blob(sha256, len(content))
        return Blob(git_oid(content), len(content), sha256, lfs=False)


def repo_key(kind: str, repo_id: str) -> str:
    return repo_id if kind == "models" else f"{kind}/{repo_id}"


def is_lfs(path: str, size: int) -> bool:
    patterns = [line.split()[0] for line in GITATTRIBUTES.splitlines()]
    return size > 0 and (size >= LFS_SIZE or any(fnmatch.fnmatch(Path(path).name, p) for p in patterns))


def lfs_blob(sha256: str, size: int) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(git_oid(pointer.encode()), size, sha256, lfs=True)


class Handler(BaseHTTPRequestHandler):
    """One route per request the client sends: a method, a regular expression on the quoted path, a function."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    api = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[\w.-]+/[\w.-]+)"
    web = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[\w.-]+/[\w.-]+)"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.caller = None
        self.raw = self.read_body()
        try:
            for method, pattern, answer in self.routes():
                match = re.fullmatch(pattern, self.url.path)
                if match and self.command in method.split():
                    self.authenticate()
                    answer(**{k: unquote(v) if v is not None else None for k, v in match.groupdict().items()})
                    return
            raise HubError(404, f"the stand-in has no {self.command} {self.url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | error.headers
            if error.code:
                headers["X-Error-Code"] = error.code
            self.send_json({"error": error.message} | error.body, error.status, headers)
        finally:
            if isinstance(self.raw, Path):
                self.raw.unlink(missing_ok=True)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def routes(self):
        return (
            ("GET", "/api/whoami-v2", self.whoami),
            ("GET", "/api/agent-harnesses", self.harnesses),
            ("POST", "/api/repos/create", self.create_repo),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("GET", self.api + "(?:/revision/(?P<revision>[^/]+))?", self.info),
            ("GET", self.api + "/refs", self.refs),
            ("GET", self.api + "/commits/(?P<revision>[^/]+)", self.commits),
            ("GET", self.api + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", self.tree),
            ("POST", self.api + "/paths-info/(?P<revision>[^/]+)", self.paths_info),
            ("POST", self.api + "/branch/(?P<branch>[^/]+)", self.create_branch),
            ("POST", self.api + "/preupload/(?P<revision>[^/]+)", self.preupload),
            ("POST", self.api + "/commit/(?P<revision>[^/]+)", self.commit),
            ("POST", self.web + r"\.git/info/lfs/objects/batch", self.lfs_batch),
            ("POST", self.web + r"\.git/info/lfs/verify", self.lfs_verify),
            ("PUT", "/storage/(?P<sha256>[0-9a-f]{64})", self.lfs_upload),
            ("GET HEAD", "/storage/(?P<sha256>[0-9a-f]{64})", self.lfs_download),
            ("GET HEAD", self.web + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
        )

    # --- reading and answering

    def read_body(self) -> Path | bytes:
        """The body; of a PUT as the path of a temporary file."""
        if self.command != "PUT":
            return b"".join(self.body_chunks())
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            for chunk in self.body_chunks():
                file.write(chunk)
        return Path(file.name)

    def body_chunks(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (chunk := self.rfile.read(min(left, CHUNK))):
            left -= len(chunk)
            yield chunk

    @property
    def json(self) -> dict:
        return json.loads(self.raw)

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.start(status, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        # logged first: who has the answer also finds it in the log
        self.hub.requests.append(Request(self.command, self.url.path, int(status), self.caller))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.end_headers()

    def send_json(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send(status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}), body)

    def send_file(self, blob_path: Path, headers: dict[str, str]) -> None:
        """A body, or the range of it that was asked for."""
        size = blob_path.stat().st_size
        start, stop, status = 0, size, HTTPStatus.OK
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            if first:
                start, stop = int(first), min(int(last) + 1, size) if last else size
            else:
                start = max(size - int(last), 0)
            if start >= stop:
                self.send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
                return
            status = HTTPStatus.PARTIAL_CONTENT
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        headers = headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        self.start(status, headers | {"Content-Length": str(stop - start)})
        if self.command == "HEAD":
            return
        with blob_path.open("rb") as file:
            file.seek(start)
            left = stop - start
            while left:
                chunk = file.read(min(left, CHUNK))
                self.wfile.write(chunk)
                left -= len(chunk)

    # --- who may do what

    def authenticate(self) -> None:
        header = self.headers.get("Authorization")
        if header is not None and header != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        self.caller = None if header is None else self.hub.user

    def may_write(self, namespace: str) -> bool:
        return self.caller == namespace or (self.caller is not None and namespace in self.hub.organizations)

    def repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        """The repo, if the caller may read (write) it.

        Raises:
            HubError: 401 without a token and 404 with one, for a repo that is missing or private to others; 403 for a
                repo that may be read but not written.
        """
        repo = self.hub.repos.get(repo_key(kind or "models", repo_id))
        may_write = self.may_write(repo_id.split("/")[0])
        if repo is None or (repo.private and not may_write):
            if self.caller is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not may_write:
            if self.caller is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(403, f"You don't have the right to write to {repo_id}")
        return repo

    def at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- routes

    def whoami(self) -> None:
        if self.caller is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in self.hub.organizations]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send_json({"type": "user", "id": "0", "name": self.caller, "orgs": orgs, "auth": access})

    def harnesses(self) -> None:
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def create_repo(self) -> None:
        if self.caller is None:
            raise HubError(401, "Invalid username or password.")
        namespace = self.json.get("organization") or self.caller
        if not self.may_write(namespace):
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        kind = f"{self.json.get('type', 'model')}s"
        repo_id = f"{namespace}/{self.json['name']}"
        url = f"{self.hub.url}/{repo_key(kind, repo_id)}"
        with self.hub.lock:
            if repo_key(kind, repo_id) in self.hub.repos:
                raise HubError(409, f"You already created this {kind[:-1]} repo", url=url)
            self.hub.create(kind, repo_id, self.json.get("visibility") == "private" or bool(self.json.get("private")))
        self.send_json({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        errors, warnings = ([{"message": m} for m in ms] for ms in validate_card(self.json["content"], "models"))
        self.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def info(self, kind: str, repo_id: str, revision: str | None) -> None:
        repo = self.repo(kind, repo_id)
        commit = self.at(repo, revision or "main")
        siblings = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
        info = {
            "_id": commit.oid[:24],
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        self.send_json(info | ({"modelId": repo_id} if kind == "models" else {}))

    def refs(self, kind: str, repo_id: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self.repo(kind, repo_id).branches.items()
        ]
        self.send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def commits(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id)
        self.at(repo, revision)
        self.send_json(
            [
                {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.user}]}
                for c in repo.history(revision)
            ]
        )

    def entries(self, commit: Commit, expand: bool) -> dict[str, dict]:
        """Path -> what `tree` and `paths-info` say about it, for every file and folder."""
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}} if expand else {}
        entries = {}
        for path, blob in sorted(commit.files.items()):
            for folder in reversed(Path(path).parents[:-1]):
                oid = hashlib.sha1(f"{commit.oid}{folder}".encode()).hexdigest()
                entries[str(folder)] = {"type": "directory", "oid": oid, "size": 0, "path": str(folder)} | last
            entries[path] = blob.info | {"path": path} | last
        return entries

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        entries = self.entries(self.at(self.repo(kind, repo_id), revision), self.flag("expand"))
        parent = folder or "."
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        inside = (
            (lambda path: parent in map(str, path.parents))
            if self.flag("recursive")
            else (lambda path: str(path.parent) == parent)
        )
        self.send_json([entry for path, entry in entries.items() if inside(Path(path))])

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        form = parse_qs(self.raw.decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        entries = self.entries(self.at(self.repo(kind, repo_id), revision), expand)
        self.send_json([entries[path] for path in form.get("paths", []) if path in entries])

    def create_branch(self, kind: str, repo_id: str, branch: str) -> None:
        repo = self.repo(kind, repo_id, write=True)
        with self.hub.lock:
            if branch in repo.branches:
                raise HubError(409, f"Reference already exists: refs/heads/{branch}")
            repo.branches[branch] = self.at(repo, self.json.get("startingPoint", "main")).oid
        self.send_json({}, 201)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        files = self.at(self.repo(kind, repo_id, write=True), revision).files
        answer = []
        for file in self.json["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in files:
                answer[-1]["oid"] = files[file["path"]].etag
        self.send_json({"files": answer})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id, write=True)
        with self.hub.lock:
            if revision not in repo.branches:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if "create_pr" in self.query:
                raise HubError(400, "the stand-in has no pull requests")
            files, header = repo.files(revision), {}
            for line in self.raw.splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    header = value
                    if value.get("parentCommit") not in (None, repo.branches[revision]):
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    content = base64.b64decode(value["content"], validate=True)
                    if is_lfs(value["path"], len(content)):
                        raise HubError(400, f"{value['path']} has to be an LFS file")
                    files[value["path"]] = self.hub.store(value["path"], content)
                elif key == "lfsFile":
                    if not self.hub.body(value["oid"]).exists():
                        raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                    files[value["path"]] = lfs_blob(value["oid"], self.hub.body(value["oid"]).stat().st_size)
                elif key in ("deletedFile", "deletedFolder"):
                    path = value["path"].rstrip("/")
                    gone = [f for f in files if f == path or (key == "deletedFolder" and f.startswith(f"{path}/"))]
                    if not gone:
                        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    for file in gone:
                        del files[file]
                else:
                    raise HubError(400, f"unknown entry {key!r} in a commit")
            if not header.get("summary"):
                raise HubError(400, "a commit needs a summary")
            oid = repo.add_commit(revision, header["summary"], files, header.get("description", ""), self.caller)
        url = f"{self.hub.url}/{repo_key(kind, repo_id)}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def lfs_batch(self, kind: str | None, repo_id: str) -> None:
        self.repo(kind, repo_id, write=True)
        verify = {"href": f"{self.hub.url}/{repo_key(kind or 'models', repo_id)}.git/info/lfs/verify"}
        objects = []
        for item in self.json["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if not self.hub.body(item["oid"]).exists():
                upload = {"href": f"{self.hub.storage_url}/storage/{item['oid']}"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha256: str) -> None:
        digest = hashlib.sha256()
        with self.raw.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise HubError(400, f"the content has sha256 {digest.hexdigest()}, not {sha256}")
        os.replace(self.raw, self.hub.body(sha256))
        self.send(200, {"ETag": f'"{sha256}"'})

    def lfs_verify(self, kind: str | None, repo_id: str) -> None:
        self.repo(kind, repo_id, write=True)
        path = self.hub.body(self.json["oid"])
        if not path.exists() or path.stat().st_size != self.json["size"]:
            raise HubError(404, f"LFS object {self.json['oid']} is not there in full")
        self.send_json({})

    def lfs_download(self, sha256: str) -> None:
        if not self.hub.body(sha256).exists():
            raise HubError(404, "no such object")
        self.send_file(self.hub.body(sha256), {"ETag": f'"{sha256}"'})

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        commit = self.at(self.repo(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers = headers
            raise error
        headers["ETag"] = f'"{blob.etag}"'
        if not blob.lfs:
            self.send_file(self.hub.body(blob.sha256), headers)
            return
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        location = f"{self.hub.storage_url}/storage/{quote(blob.sha256)}"
        self.send(HTTPStatus.FOUND, headers | {"Location": location})


@pytest.fixture
def hub(tmp_path):
    """A Hub without repos."""
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.close()
    shutil.rmtree(hub.folder)
