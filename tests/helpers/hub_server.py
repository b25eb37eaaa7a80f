"""A Hugging Face Hub on this machine, for the real `huggingface_hub`.

What it answers: which commit a revision is, the list of a commit's files, and the files, whole or
from a byte on. Repositories can be closed to those without a token, and a download can be cut.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

import huggingface_hub

TOKEN = "hf_of_a_member"
"""Opens gated and private repositories."""
_PLACE = re.compile(
    r"(?P<api>/api)?/(?:(?P<kind>datasets|models)/)?(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<verb>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<file>.*))?)?"
)


class Hub:
    """The repositories, and what has been asked for."""

    def __init__(self, url: str):
        self.url = url
        self.requests: list[str] = []
        """Method, path and range of each."""
        self.cut: dict[str, int] = {}
        """File → how many times more it is cut in the middle."""
        self._files: dict[str, dict[str, Mapping[str, bytes]]] = {}
        self._refs: dict[str, dict[str, str]] = {}
        self._closed: dict[str, str] = {}

    def add(
        self, name: str, files: Mapping[str, bytes], kind: str = "datasets", revision: str = "main"
    ) -> str:
        """A commit with these files, to which the revision points from now on."""
        digest = hashlib.sha1(repr((kind, name, revision, sorted(files.items()))).encode())
        commit = digest.hexdigest()
        self._files.setdefault(f"{kind}/{name}", {})[commit] = dict(files)
        self._refs.setdefault(f"{kind}/{name}", {})[revision] = commit
        return commit

    def close(self, name: str, kind: str = "datasets", error: str = "GatedRepo") -> None:
        """From now on a token is needed; otherwise this is the Hub's `X-Error-Code`."""
        self._closed[f"{kind}/{name}"] = error

    def downloads(self) -> list[str]:
        """The files that were asked for, with ranges."""
        return [r for r in self.requests if r.startswith("GET") and "/resolve/" in r]

    def find(self, path: str, token: str) -> tuple[int, dict[str, str], bytes, str]:
        """Status, headers, body and file name of the answer."""
        parts = _PLACE.fullmatch(urllib.parse.urlsplit(path).path)
        key = parts and f"{parts['kind'] or 'models'}/{parts['name']}"
        if not parts or key not in self._files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"", ""
        refusal = self._closed.get(key, "") if token != f"Bearer {TOKEN}" else ""
        # Who may not have the files of a gated repository may still see what there is.
        if refusal == "RepoNotFound" or (refusal and not parts["api"]):
            return 401, {"X-Error-Code": refusal}, b"", ""
        revision = urllib.parse.unquote(parts["revision"] or "main")
        commit = self._refs[key].get(revision, revision)
        if commit not in self._files[key]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"", ""
        files = self._files[key][commit]
        if parts["verb"] == "tree":
            tree = [
                {"type": "file", "path": f, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for f, x in files.items()
            ]
            return 200, {}, json.dumps(tree).encode(), ""
        if parts["verb"] != "resolve":
            siblings = [{"rfilename": file} for file in files]
            info = {"id": parts["name"], "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(info).encode(), ""
        file = urllib.parse.unquote(parts["file"])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"", ""
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit}, files[file], file


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body_wanted=False)

        def do_GET(self):
            self.answer(body_wanted=True)

        def answer(self, body_wanted: bool) -> None:
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            ranged = f" from {start[1]}" if start else ""
            hub.requests.append(f"{self.command} {self.path}{ranged}")
            status, headers, body, file = hub.find(self.path, self.headers.get("Authorization", ""))
            if start and status == 200:
                first = int(start[1])
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[first:]
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if body_wanted and file and hub.cut.get(file, 0):
                hub.cut[file] -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif body_wanted:
                self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub for as long as the block runs."""
    with http.server.ThreadingHTTPServer(("localhost", 0), http.server.BaseHTTPRequestHandler) as s:
        hub = Hub(f"http://localhost:{s.server_port}")
        s.RequestHandlerClass = _handler(hub)
        threading.Thread(target=s.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            s.shutdown()


def use(patch, hub: Hub, cache) -> None:
    """This process asks that Hub, and keeps files in that folder."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.delenv("HF_TOKEN", raising=False)


def environment(hub: Hub, home) -> dict[str, str]:
    """The variables with which another process does the same."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
