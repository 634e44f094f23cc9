"""A server on this machine that answers as the Hub's API does: huggingface_hub and Transformers download from it as they are."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves folders as repositories of models; `asked` lists what was asked for.

    Args:
        repositories: folder of each repository, by its name `owner/name`.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.asked = repositories, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *args):
                """Nothing to the screen."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Variables for a process that is to take this for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}

    def answer(self, request, body: bool) -> None:
        """One request."""
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(request, *file.groups(), body)
        elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(request, listing[1], listing[3] or "", body)
        elif info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._info(request, info[1], body)
        else:
            self._send(request, 404, b"{}", body)

    def _files(self, repository: str) -> list[Path]:
        return sorted(path for path in self.repositories[repository].rglob("*") if path.is_file())

    def _info(self, request, repository: str, body: bool) -> None:
        if repository not in self.repositories:
            self._send(request, 404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            return
        folder = self.repositories[repository]
        siblings = [
            {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
            for path in self._files(repository)
        ]
        facts = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
        self._send(request, 200, json.dumps({**facts, "siblings": siblings}).encode(), body)

    def _tree(self, request, repository: str, under: str, body: bool) -> None:
        folder = self.repositories.get(repository)
        if folder is None or not (folder / under).is_dir():
            code = "RepoNotFound" if folder is None else "EntryNotFound"
            self._send(request, 404, b"{}", body, {"X-Error-Code": code})
            return
        entries = [
            {"type": "file", "oid": "0", "size": path.stat().st_size, "path": path.relative_to(folder).as_posix()}
            for path in self._files(repository)
            if path.is_relative_to(folder / under)
        ]
        self._send(request, 200, json.dumps(entries).encode(), body)

    def _file(self, request, repository: str, revision: str, name: str, body: bool) -> None:
        folder = self.repositories.get(repository)
        if folder is None or not (folder / name).is_file():
            code = "RepoNotFound" if folder is None else "EntryNotFound"
            self._send(request, 404, b"", body, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if asked is None:
            self._send(request, 200, content, body, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(request, 206, content[first : last + 1], body, headers)

    def _send(self, request, status: int, content: bytes, body: bool, headers=None) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)
