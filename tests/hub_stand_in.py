"""What huggingface_hub says to the hub, answered by a server on this machine."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_standIn"


class StandIn:
    """Repositories by name: of each revision its files."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.commits: list[str] = []

    def put(self, name, folder, revision="main"):
        """Take a folder's files as a revision of a repository."""
        files = {
            each.relative_to(folder).as_posix(): each.read_bytes() for each in Path(folder).rglob("*") if each.is_file()
        }
        self.repos.setdefault(name, {})[revision] = files

    def find(self, name, revision):
        """The files of a revision, which may be the commit that it is at; and that commit."""
        for branch, files in self.repos[name].items():
            commit = hashlib.sha1(repr((branch, sorted(files.items()))).encode()).hexdigest()
            if revision in (branch, commit):
                return files, commit
        raise LookupError(revision)


@contextmanager
def serve(stand_in):
    """The address at which it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": stand_in}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repo = f"{owner}/{name}"
        if repo not in self.hub.repos:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        try:
            files, commit = self.hub.find(repo, revision.replace("%2F", "/"))
        except LookupError:
            self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return
        if api and rest[:1] == ["tree"] and not rest[2:]:
            digest = lambda content: hashlib.sha1(content).hexdigest()
            listed = [{"type": "file", "path": p, "size": len(c), "oid": digest(c)} for p, c in files.items()]
            self._send(200, listed)
        elif api and rest[:1] != ["tree"]:
            self._send(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": each} for each in files]})
        elif (file := "/".join(rest[2:])) in files:
            tag = hashlib.sha1(files[file]).hexdigest()
            self._send(200, files[file], ETag=f'"{tag}"', X_Repo_Commit=commit)
        else:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].strip("/")
        self.hub.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        here = f"http://{self.headers['Host']}"
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'us'}/{asked['name']}"
            new = name not in self.hub.repos
            self.hub.repos.setdefault(name, {"main": {}})
            self._send(200 if new else 409, {"url": f"{here}/{name}", "error": "You already created this model repo"})
            return
        if path == "api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
            return
        _, _, owner, name, verb, revision = path.split("/")
        repo = self.hub.repos[f"{owner}/{name}"]
        if verb == "branch":
            repo.setdefault(revision, dict(repo["main"]))
            self._send(200, {})
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            self._send(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        elif verb == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.hub.commits.append(line["value"]["summary"])
            self._send(200, {"commitUrl": f"{here}/{owner}/{name}/commit/0", "commitOid": "0"})
