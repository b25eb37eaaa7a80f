"""A Google Cloud Storage server on this machine, for the real clients of it.

gcp-storage-emulator with what TensorStore relies on besides: generations of what is read, writes
on condition of a generation, and no trace of an upload that was cut off.
"""

import contextlib
import functools
import http.server
import io
import logging
import pathlib
import re
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET, READ_ONLY, OBJECTS_ONLY = "bucket", "readonly", "objectsonly"
"""The buckets that there are; in the last, nobody has storage.buckets.get."""


class _Handler(RequestHandler):
    """One request: refused, or answered by the emulator."""

    def _whole_body(self) -> bool:
        """Whether all of the body has come; the emulator would store what a killed client sent."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if length:
            self.rfile = io.BytesIO(body)
        return len(body) == length

    def _status(self) -> int:
        """The HTTP status of a request that is refused, or 0. Sets `generation`, "0" for none."""
        url = urllib.parse.urlsplit(self.path)
        match = re.match(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o/?(.*))?", url.path)
        bucket, name = match.groups() if match else ("", "")
        about_bucket = name is None
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(name or "") or query.get("name", "")
        self.generation = "0"
        if not self._whole_body():
            return 400
        if query.get("uploadType") == "multipart":  # which names the object in its first part
            name = re.search(rb'"name": *"([^"]*)"', self.rfile.getvalue())[1].decode()
        with contextlib.suppress(NotFound):
            self.generation = self.storage.get_file_obj(bucket, name)["generation"]
        if bucket == READ_ONLY and self.command != "GET":
            return 403
        if bucket == OBJECTS_ONLY and about_bucket:
            return 403
        if query.get("ifGenerationMatch", self.generation) != self.generation:
            return 412
        if query.get("ifGenerationNotMatch", "0") == self.generation != "0":
            return 304
        return 0

    def handle_one_request(self):
        """As the base class does it, with `_status` in between."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            return
        status = self._status()
        if status:
            self.send_response(status)
            self.end_headers()
            return
        with contextlib.suppress(BrokenPipeError):  # gcsfs asks twice, and takes the first answer
            getattr(self, f"do_{self.command}")()

    def end_headers(self):
        """Adds the generation to what is read."""
        if self.command == "GET" and self.generation != "0":
            self.send_header("X-Goog-Generation", self.generation)
        super().end_headers()


class Bucket:
    """What the server holds, as anyone sees it, and the environment that leads clients to it."""

    def __init__(self, server: http.server.HTTPServer, storage: Storage):
        self._server, self._storage = server, storage
        url = f"http://localhost:{server.server_port}"
        self._objects = f"{url}/storage/v1/b/{BUCKET}/o"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind it is
        }

    def names(self, prefix: str = "") -> list[str]:
        """The objects whose names begin so."""
        return [item["name"] for item in self._storage.get_file_list(BUCKET, prefix)[0]]

    def kill(
        self, process: subprocess.Popen, prefix: str, when: Callable[[list[str]], bool]
    ) -> None:
        """SIGKILL as soon as the names that begin so are as `when` has it, before anything else
        is answered. Waits for the end of the process."""

        def look():
            if when(self.names(prefix)):
                process.kill()

        self._server.service_actions = look  # which it calls after each request
        process.wait()
        del self._server.service_actions

    def read(self, name: str) -> bytes:
        """An object."""
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{self._objects}/{quoted}?alt=media") as answer:
            return answer.read()

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces an object."""
        url = self._objects.replace("/storage/v1/", "/upload/storage/v1/")
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        urllib.request.urlopen(f"{url}?{query}", data=content).close()

    def download(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
        """Copies the objects whose names begin so into a folder, and returns it."""
        for name in self.names(prefix):
            file = folder / name.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(name))
        return folder


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """A server for as long as the block runs."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # each 404 otherwise
    storage = Storage(use_memory_fs=True)
    for name in (BUCKET, READ_ONLY, OBJECTS_ONLY):
        create_bucket(name, storage)
    handler = functools.partial(_Handler, storage)
    with http.server.HTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Bucket(server, storage)
        finally:
            server.shutdown()
