"""Servers of shards in this process: HTTP ones with every bad habit, and an S3 store."""

import hashlib
import json
import re
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Server:
    """An HTTP server of a folder, and what it was asked."""

    folder: Path
    ranges: bool = True
    #: requests for content that it fails before it answers one
    failures: int = 0
    #: how it fails: "stall", "reset" (half-way), a status such as "503"
    how: str = "reset"
    #: answers that are no files, by path
    answers: dict[str, bytes] = field(default_factory=dict)
    port: int = 0
    #: (path, Range header) of each request for content
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def url(self, path: Path) -> str:
        return f"http://127.0.0.1:{self.port}/{path.relative_to(self.folder)}"

    def fails_now(self) -> bool:
        with self.lock:
            self.failures -= 1
            return self.failures >= 0


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            asked = self.path.partition("?")[0]
            path = server.folder / asked.lstrip("/")
            if asked not in server.answers and not path.is_file():
                return self.send_error(404)
            content = server.answers.get(asked) or path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if body:
                with server.lock:
                    server.asked.append((self.path, self.headers.get("Range", "")))
            fails = body and server.fails_now()
            if fails and server.how.isdigit():
                return self.send_error(int(server.how))
            if wanted and server.ranges:
                first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
                if first >= len(content):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fails:
                self._fail(content)
            elif body:
                self.wfile.write(content)

        def _fail(self, content: bytes) -> None:
            self.wfile.write(content[:100])
            self.wfile.flush()
            if server.how == "stall":
                server.closing.wait(20)
            # closes with a reset instead of an end
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    return Handler


@contextmanager
def serve(server: Server) -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A running S3 server with one bucket; yields the bucket's URL, set as the default endpoint."""
    moto = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    store = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # the store's memory is one for the process, whatever server asks
        reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        store.stop()


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, shards: list[Path], folder: Path) -> Iterator[Server]:
    """What the Hugging Face Hub answers about one data set, hf://datasets/org/name."""
    package = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    server, listing = Server(folder), []
    for shard in shards:
        path = folder / "datasets/org/name/resolve/main" / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shard.read_bytes())
        size = path.stat().st_size
        oid = hashlib.sha1(shard.read_bytes()).hexdigest()
        listing.append({"type": "file", "oid": oid, "size": size, "path": shard.name})
    about = {"id": "org/name", "sha": "0" * 40, "siblings": []}
    server.answers["/api/datasets/org/name"] = json.dumps(about).encode()
    server.answers["/api/datasets/org/name/tree/main"] = json.dumps(listing).encode()
    with serve(server):
        endpoint = f"http://127.0.0.1:{server.port}"
        files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(package.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(package.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
        package.HfFileSystem.clear_instance_cache()
        yield server
    package.HfFileSystem.clear_instance_cache()
