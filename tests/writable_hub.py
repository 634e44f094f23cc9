"""A server on this machine that takes uploads as the Hub does: repositories, branches, large files, commits all at once."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
OWNER = "lab"
LARGE = (".safetensors",)


class WritableHub:
    """Repositories of models in memory.

    Attributes:
        repositories: {name: {"private", "branches": {branch: commit}}}.
        commits: {id: {name: bytes}}, with the empty first one.
        blobs: uploaded large files by their sha256, visible or not.
        asked: (method, path) of every request.
        drop: the next request whose (method, path) matches this pattern is cut off without an answer; a number of times.
        refuse: status for requests that match a pattern.
    """

    def __init__(self):
        self.repositories, self.commits, self.blobs, self.messages = {}, {}, {}, {}
        self.asked, self.drop, self.refuse, self.ignored = [], {}, {}, ()
        self.before_commit = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *args):
                """Nothing to the screen."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Variables for a process that is to take this for the Hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        return {**own, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What somebody sees who looks at a branch or commit."""
        return self.commits[self.repositories[repository]["branches"].get(revision, revision)]

    def sent(self, method: str, pattern: str) -> list[str]:
        return [path for how, path in self.asked if how == method and re.search(pattern, path)]

    def answer(self, request) -> None:
        parts = urlsplit(request.path)
        path, query, method = unquote(parts.path), parse_qs(parts.query), request.command
        length = int(request.headers.get("Content-Length") or 0)
        if "chunked" in (request.headers.get("Transfer-Encoding") or ""):
            content = b""
            while size := int(request.rfile.readline(), 16):
                content += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        else:
            content = request.rfile.read(length)
        self.asked.append((method, path))
        for pattern, left in self.drop.items():
            if left and re.search(pattern, f"{method} {path}"):
                self.drop[pattern] -= 1
                request.close_connection = True
                return
        for pattern, status in self.refuse.items():
            if re.search(pattern, f"{method} {path}"):
                return self.send(request, status, {"error": "because the test says so"})
        who = TOKENS.get((request.headers.get("Authorization") or "").removeprefix("Bearer "))
        if method in ("GET", "HEAD"):
            return self.read(request, path, who)
        if path.startswith("/upload/"):
            self.blobs[path.rpartition("/")[2]] = content
            return self.send(request, 200, {})
        if path == "/api/validate-yaml":
            return self.validate(request, json.loads(content)["content"])
        if who is None:
            return self.send(request, 401, {"error": "Invalid username or password."})
        if who != "write":
            return self.send(request, 403, {"error": "You don't have the rights"})
        return self.write(request, path, query, content)

    def read(self, request, path: str, who) -> None:
        if path == "/api/whoami-v2":
            return self.send(request, 200 if who else 401, {"name": OWNER, "type": "user", "orgs": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            return self.send(request, 200, []) if found[1] in self.repositories else self.missing(request, "Repo")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = info or file
        name, revision = (asked[1], asked[2]) if asked else (None, None)
        repository = self.repositories.get(name)
        if repository is None or (repository["private"] and who is None):
            return self.missing(request, "Repo")
        commit = repository["branches"].get(revision or "main", revision)
        if commit not in self.commits:
            return self.missing(request, "Revision")
        if info:
            siblings = [{"rfilename": file, "size": len(bytes_)} for file, bytes_ in self.commits[commit].items()]
            facts = {"id": name, "modelId": name, "sha": commit, "private": repository["private"], "tags": []}
            return self.send(request, 200, {**facts, "downloads": 0, "siblings": siblings})
        content = self.commits[commit].get(file[3])
        if content is None:
            return self.missing(request, "Entry", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.send(request, 200, content, {**headers, "Content-Type": "application/octet-stream"})

    def validate(self, request, text: str) -> None:
        """As the Hub: metadata must be YAML, its model-index must have names, types and values."""
        try:
            values = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            for entry in values.get("model-index", []):
                assert entry["name"]
                for result in entry["results"]:
                    assert result["task"]["type"]
                    assert result["dataset"]["type"]
                    assert result["dataset"]["name"]
                    assert all(metric["type"] and "value" in metric for metric in result["metrics"])
        except (yaml.YAMLError, AssertionError, KeyError, AttributeError) as error:
            return self.send(request, 400, {"errors": [{"message": f"not valid: {error!r}"}], "warnings": []})
        return self.send(request, 200, {"errors": [], "warnings": []})

    def write(self, request, path: str, query, content: bytes) -> None:
        if path == "/api/repos/create":
            return self.create(request, json.loads(content))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(content)["objects"]
            steps = {o["oid"]: {"upload": {"href": f"{self.url}/upload/{o['oid']}"}} for o in wanted}
            objects = [{**o, **({} if o["oid"] in self.blobs else {"actions": steps[o["oid"]]})} for o in wanted]
            return self.send(request, 200, {"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        name, what, revision = found[1], found[2], found[3]
        if name not in self.repositories:
            return self.missing(request, "Repo")
        branches = self.repositories[name]["branches"]
        if what == "branch":
            branches[revision] = branches["main"]
            return self.send(request, 201, {})
        if revision not in branches:
            return self.missing(request, "Revision")
        if what == "preupload":
            return self.preupload(request, self.commits[branches[revision]], json.loads(content)["files"])
        if self.before_commit is not None:
            self.before_commit()
        return self.commit(request, name, revision, content, "create_pr" in query)

    def create(self, request, values) -> None:
        name = f"{values.get('organization') or OWNER}/{values['name']}"
        if name.split("/")[0] != OWNER:
            return self.send(
                request, 403, {"error": "You don't have the rights to create a model under this namespace"}
            )
        if name in self.repositories:
            return self.send(
                request, 409, {"url": f"{self.url}/{name}", "error": "You already created this model repo"}
            )
        first = hashlib.sha1(name.encode()).hexdigest()
        self.commits[first] = {".gitattributes": b"*.safetensors filter=lfs"}
        self.repositories[name] = {"private": values.get("visibility") == "private", "branches": {"main": first}}
        return self.send(request, 200, {"url": f"{self.url}/{name}", "name": name})

    def preupload(self, request, there, wanted) -> None:
        def of(file):
            large = file["path"].endswith(LARGE)
            content = there.get(file["path"])
            digest = hashlib.sha256(content) if large and content is not None else None
            git = hashlib.sha1(b"blob %d\0" % len(content) + content) if content is not None else None
            oid = None if content is None else (digest or git).hexdigest()
            facts = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "oid": oid}
            return {**facts, "shouldIgnore": file["path"] in self.ignored}

        self.send(request, 200, {"files": [of(file) for file in wanted]})

    def commit(self, request, name: str, revision: str, content: bytes, pull_request: bool) -> None:
        repository = self.repositories[name]
        lines = [json.loads(line) for line in content.splitlines()]
        header = lines[0]["value"]
        parent = repository["branches"][revision]
        if header.get("parentCommit") not in (None, parent):
            return self.send(request, 412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(self.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{name}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        repository["branches"]["refs/pr/1" if pull_request else revision] = oid
        self.messages[oid] = header["summary"]
        answer = {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}
        more = {"pullRequestUrl": f"{self.url}/{name}/discussions/1"} if pull_request else {}
        return self.send(request, 200, {**answer, **more})

    def missing(self, request, what: str, headers=None) -> None:
        self.send(request, 404, b"", {"X-Error-Code": f"{what}NotFound", **(headers or {})})

    def send(self, request, status: int, content, headers=None) -> None:
        kind = {} if isinstance(content, bytes) else {"Content-Type": "application/json"}
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **kind, **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)
