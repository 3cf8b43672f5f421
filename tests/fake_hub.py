"""A Hub of one's own: a server on this machine that answers huggingface_hub as the Hub does, from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"


class FakeHub:
    """`repos` has of each repository the revisions, and of each revision the files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo: str, folder, inside: str, revision: str = MAIN) -> None:
        """The files of a folder, or one file."""
        files = self.repos.setdefault(repo, {MAIN: {}}).setdefault(revision, {})
        if folder.is_file():
            files[inside] = folder.read_bytes()
            return
        for file in folder.iterdir():
            if file.is_file():
                files[f"{inside}/{file.name}".lstrip("/")] = file.read_bytes()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], object]:
        """Status, headers, and what goes as JSON unless it is bytes."""
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.repos[repo] = {MAIN: {}}
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo)
            return 200, {}, {"url": f"{self.endpoint}/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if parts[:2] == ["api", "models"]:
            return self._of_repo("/".join(parts[2:4]), parts[4:], body)
        if parts[2:3] == ["resolve"]:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {}, {"error": "not found"}

    def _of_repo(self, repo: str, what: list[str], body: bytes) -> tuple[int, dict[str, str], object]:
        action, revision = (*what, *("revision", MAIN)[len(what) :])[:2]
        files = self._files(repo, revision)
        if files is None:
            code = "RevisionNotFound" if repo in self.repos else "RepoNotFound"
            return 404, {"X-Error-Code": code}, {"error": "not found"}
        return 200, {}, getattr(self, f"_{action.replace('-', '_')}")(repo, revision, files, body)

    def _revision(self, repo: str, revision: str, files: dict[str, bytes], _: bytes) -> object:
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": sha_of(repo, revision, files), "siblings": siblings, "tags": []}

    def _tree(self, repo: str, revision: str, files: dict[str, bytes], _: bytes) -> object:
        return [entry(name, data) for name, data in files.items()]

    def _paths_info(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> object:
        return [entry(name, files[name]) for name in parse_qs(body.decode())["paths"] if name in files]

    def _preupload(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> object:
        paths = [one["path"] for one in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def _commit(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> object:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.commits.append(line["value"]["summary"])
            else:
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitOid": "c" * 40, "commitUrl": f"{self.endpoint}/{repo}/commit/{'c' * 40}"}

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], object]:
        files = self._files(repo, revision)
        if files is None or name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        etag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha_of(repo, revision, files)}, files[name]

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.repos.get(repo, {})
        shas = {sha_of(repo, name, files): files for name, files in revisions.items()}
        return revisions.get(revision, shas.get(revision))


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *words: object) -> None:
        """Says nothing."""

    def _go(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, said = self.hub.answer(self.command, unquote(urlsplit(self.path).path), body)
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = _go


def entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def sha_of(repo: str, revision: str, files: dict[str, bytes]) -> str:
    """A revision is another one when its files are."""
    content = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())]
    return revision if len(revision) == 40 else hashlib.sha1(repr((repo, revision, content)).encode()).hexdigest()
