import dataclasses
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from vlm.data.make import download
from vlm.data.make.adapters.base import Adapter
from vlm.data.make.annotations import Failure
from vlm.data.make.download import Limits, fetch_files, fetch_repository, unpack
from vlm.data.make.download import fetch as fetch_all
from vlm.errors import DataError, TransientError

BODY = bytes(range(256)) * 1000
#: so much time that a busy machine is never taken for a slow server
LIMITS = Limits(max_bytes=len(BODY), stall_s=60.0, total_s=60.0, num_threads=4)
#: of those that are slow
SHORT = {
    "/stall": dataclasses.replace(LIMITS, stall_s=0.3),
    "/trickle": dataclasses.replace(LIMITS, total_s=0.3),
}


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []
    over = threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", {"/moved": "/ok"}.get(self.path, "file:///etc/passwd"))
            self.end_headers()
            return
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
            return
        if not self.path.startswith(("/ok", "/large", "/short", "/stall", "/trickle", "/endless")):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path.startswith(("/ok", "/short")):
            self.send_header("Content-Length", str(len(BODY)))
        if self.path == "/large":
            self.send_header("Content-Length", str(len(BODY) + 1))
        self.end_headers()
        try:
            self.send_body()
        except ConnectionError:
            # the client had enough
            return

    def send_body(self) -> None:
        if self.path == "/stall":
            self.over.wait()
        elif self.path == "/trickle":
            while not self.over.wait(0.1):
                self.wfile.write(b"x")
        elif self.path == "/endless":
            for _ in range(100):
                self.wfile.write(BODY)
        else:
            self.wfile.write(BODY[:100] if self.path == "/short" else BODY)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.over.set()
        server.shutdown()


def fetch(
    wanted: list[tuple[str, str]], root: Path, limits: Limits = LIMITS
) -> tuple[Counter[str], list[Failure]]:
    failures: list[Failure] = []
    counts = fetch_files(wanted, root, limits, lambda _: None, failures.append)
    return counts, failures


def test_files_arrive_and_are_not_fetched_twice(server: str, tmp_path: Path) -> None:
    wanted = [(f"{server}/ok/{i}", f"v/{i % 7}/{i}.mp4") for i in range(30)]
    wanted.append((f"{server}/moved", "moved.mp4"))
    counts, failures = fetch(wanted, tmp_path)
    assert counts == {"fetched": 31} and not failures
    assert {(tmp_path / place).read_bytes() for _, place in wanted} == {BODY}
    asked = len(Handler.asked)
    assert fetch(wanted, tmp_path)[0] == {"there before": 31}
    assert len(Handler.asked) == asked


@pytest.mark.parametrize(
    ("path", "reason", "error"),
    [
        ("/none", "HTTP 404", "Not Found"),
        ("/moved/out", "HTTP 302", "file:///etc/passwd"),
        ("/loop", "HTTP 302", "redirect"),
        ("/large", "refused", f"more than {len(BODY)} bytes"),
        ("/endless", "refused", f"more than {len(BODY)} bytes"),
        ("/stall", "too slow", "timed out"),
        ("/trickle", "too slow", "not complete after"),
        ("/short", "no answer", f"100 of {len(BODY)} bytes"),
    ],
)
def test_servers_that_misbehave(
    server: str, tmp_path: Path, path: str, reason: str, error: str
) -> None:
    limits = SHORT.get(path, LIMITS)
    counts, (failure,) = fetch([(server + path, "a.mp4")], tmp_path, limits)
    assert counts == {reason: 1}
    assert failure.error.startswith(server + path) and error in failure.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "", "http://[", "http://a b/"])
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    _, (failure,) = fetch([(url, "a.mp4")], tmp_path)
    assert failure.reason in ("refused", "no answer")


def test_nobody_is_listening(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
    _, (failure,) = fetch([(f"http://127.0.0.1:{port}/ok", "a.mp4")], tmp_path)
    assert failure.reason == "no answer"


@pytest.mark.parametrize("place", ["../a.mp4", "/a.mp4", "", "x.zip!a.mp4"])
def test_places_outside_the_root(server: str, tmp_path: Path, place: str) -> None:
    asked = len(Handler.asked)
    _, (failure,) = fetch([(f"{server}/ok", place)], tmp_path / "root")
    assert failure.reason == "refused"
    assert len(Handler.asked) == asked


def test_few_files_are_asked_for_ahead(server: str, tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield f"{server}/ok", f"{taken}.mp4"

    stream = download._in_threads(endless(), tmp_path, LIMITS)
    next(stream)
    assert taken <= 16
    stream.close()


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(download, "snapshot_download", lambda *a, **k: calls.append((a, k)))
    fetch_repository("a/b", tmp_path, ("*.csv",))
    options = {"repo_type": "dataset", "local_dir": tmp_path, "allow_patterns": ["*.csv"]}
    assert calls == [(("a/b",), options)]


def test_a_whole_data_set(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        assert (name, allow_patterns) == ("a/b", ["*.csv"])
        (local_dir / "a.csv").write_text(f"{server}/ok,v.mp4\n{server}/none,w.mp4\n")
        write_tar(local_dir / "d" / "x.tar.gz", "videos/a.mp4")

    def urls(root: Path) -> Iterator[tuple[str, str]]:
        for line in (root / "a.csv").read_text().splitlines():
            url, place = line.split(",")
            yield url, place

    monkeypatch.setattr(download, "snapshot_download", snapshot)
    adapter = Adapter(
        annotations=lambda *_: iter(()),
        licence="",
        help="",
        hub_id="a/b",
        hub_files=("*.csv",),
        urls=urls,
    )
    root = tmp_path / "root"
    assert fetch_all(adapter, root, (), lambda _: None) == {"fetched": 1, "HTTP 404": 1}
    assert (root / "v.mp4").read_bytes() == BODY
    assert (root / "d" / "videos" / "a.mp4").exists()
    assert "/none" in (root / "download-failed.jsonl").read_text()
    nowhere = Adapter(annotations=adapter.annotations, licence="", help="")
    with pytest.raises(DataError, match="by hand"):
        fetch_all(nowhere, root, (), lambda _: None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(LocalEntryNotFoundError("offline"), TransientError), (OSError("disk"), TransientError)],
)
def test_a_hub_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(download, "snapshot_download", fails)
    with pytest.raises(kind, match="a/b"):
        fetch_repository("a/b", tmp_path, ())


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the name right"):
        fetch_repository("a//b c", tmp_path, ())


def test_unpacking_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar.gz", "videos/a.mp4")
    unpack(tmp_path)
    assert (tmp_path / "d" / "videos" / "a.mp4").read_bytes() == b"body"
    (tmp_path / "d" / "videos" / "a.mp4").unlink()
    unpack(tmp_path)
    assert not (tmp_path / "d" / "videos" / "a.mp4").exists()


@pytest.mark.parametrize("name", ["../out.mp4", "a/../../out.mp4", "/{root}/out.mp4"])
def test_unpacking_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar.gz", name.format(root=tmp_path))
    with pytest.raises(DataError, match="x.tar.gz cannot be unpacked: .*leads out"):
        unpack(tmp_path)
    assert not (tmp_path / "out.mp4").exists()


def test_links_are_not_unpacked(tmp_path: Path) -> None:
    """A link and then a file through it would be written anywhere."""
    (tmp_path / "d").mkdir()
    (tmp_path / "outside").mkdir()
    with tarfile.open(tmp_path / "d" / "x.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("there")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        archive.addfile(link)
        info = tarfile.TarInfo("there/a.mp4")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"body"))
    unpack(tmp_path)
    assert not (tmp_path / "d" / "there").is_symlink()
    assert not list((tmp_path / "outside").iterdir())
    assert (tmp_path / "d" / "there" / "a.mp4").read_bytes() == b"body"


def write_tar(path: Path, name: str) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = 4
        archive.addfile(info, io.BytesIO(b"body"))
