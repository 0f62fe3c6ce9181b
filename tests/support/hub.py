"""A loopback server that speaks the Hub's protocol to a real huggingface_hub client, and keeps real bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories in memory: every commit is a whole tree, blobs are kept by their hash.

    Attributes:
        requests: (method, path) of everything that was asked.
        uploaded: oids of the large files that were sent.
        cut_at: number of the request whose connection is cut; None for none.
        fail_at: number of the request that is answered by an error of the server; None for none.
    """

    def __init__(self) -> None:
        self.trees: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorization: list[str | None] = []
        self.uploaded: list[str] = []
        self.cut_at: int | None = None
        self.fail_at: int | None = None
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def tree(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The commit and the files at a revision: main, or a commit."""
        commits = self.trees[repo]
        index = len(commits) - 1 if revision == "main" else int(revision, 16) - 1
        return f"{index + 1:040x}", commits[index]


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def begin(self) -> bool:
        """Note the request; False where its connection is to be cut."""
        hub = self.server_hub
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append((self.command, self.path))
            hub.authorization.append(self.headers.get("Authorization"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if number == hub.cut_at:
            self.close_connection = True
            self.connection.close()
            return False
        if number == hub.fail_at:
            self.answer({"error": "out of order"}, 500)
            return False
        return True

    def do_GET(self) -> None:
        if not self.begin():
            return
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            repo = match[1]
            if repo not in hub.trees:
                return self.missing("RepoNotFound")
            sha, files = hub.tree(repo, match[2] or "main")
            return self.answer(
                {
                    "id": repo,
                    "sha": sha,
                    "private": hub.private.get(repo, False),
                    "siblings": [{"rfilename": f} for f in files],
                }
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)(?:/(.*))?", path):
            if match[1] not in hub.trees:
                return self.missing("RepoNotFound")
            _, files = hub.tree(match[1], match[2])
            entries = [
                {"type": "file", "path": name, "oid": git_oid(content), "size": len(content)}
                for name, content in files.items()
            ]
            return self.answer(entries)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.*)", path):
            repo, revision, name = match.groups()
            if repo not in hub.trees:
                return self.missing("RepoNotFound")
            sha, files = hub.tree(repo, revision)
            if name not in files:
                return self.missing("EntryNotFound")
            content = files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", sha)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return None
        return self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self.begin():
            return None
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repo in hub.trees:
                return self.answer({"url": f"{hub.url}/{repo}", "error": "exists"}, 409)
            hub.trees[repo], hub.private[repo] = (
                [{}],
                asked.get("private") is True or asked.get("visibility") == "private",
            )
            return self.answer({"url": f"{hub.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(\w+)", path):
            _, files = hub.tree(match[1], match[2])
            return self.answer({"files": [self.mode(file["path"], files) for file in json.loads(self.body)["files"]]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                answer = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in hub.blobs:
                    answer["actions"] = {"upload": {"href": f"{hub.url}/upload/{asked['oid']}"}}
                objects.append(answer)
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(\w+)", path):
            repo = match[1]
            tree = dict(hub.tree(repo)[1])
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header" and value.get("parentCommit", hub.tree(repo)[0]) != hub.tree(repo)[0]:
                    return self.answer({"error": "the repository has changed"}, 412)
                if entry["key"] == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    tree[value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del tree[value["path"]]
            hub.trees[repo].append(tree)
            oid = hub.tree(repo)[0]
            return self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid})
        return self.missing("EntryNotFound")

    @staticmethod
    def mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large = path.endswith(LARGE)
        found: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in files:
            found["oid"] = hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])
        return found

    def do_PUT(self) -> None:
        if not self.begin():
            return
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server_hub.blobs[oid] = self.body
        self.server_hub.uploaded.append(oid)
        self.answer({})
