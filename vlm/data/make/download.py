"""Fetches a data set into a folder: a repository of the Hugging Face hub, or files by address.

What is there is not fetched again. A file appears under its name only when it is complete. Lists of
addresses come from anybody: only HTTP is spoken, and the size, the time and the place of every file
are bounded. Not here: which files a data set needs (`vlm.data.make.adapters.registry`).
"""

import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlm.data.make.adapters.base import Adapter
from vlm.data.make.annotations import Failure
from vlm.data.make.media import parse_ref
from vlm.errors import DataError, SampleError, TransientError

_CHUNK_BYTES = 1 << 16
_UNPACKED = ".unpacked"
PRESENT = "there before"
FETCHED = "fetched"
FAILED_FILE = "download-failed.jsonl"


@dataclass(frozen=True)
class Limits:
    """What one file may cost."""

    max_bytes: int = 1 << 30
    #: without a byte
    stall_s: float = 30.0
    #: in all
    total_s: float = 600.0
    num_threads: int = 16


def fetch(
    adapter: Adapter, root: Path, files: Sequence[str], progress: Callable[[Counter[str]], None]
) -> Counter[str]:
    """Fetches all of a data set that an adapter knows where to get, and unpacks it.

    Args:
        files: Globs of the repository's files, where not all are wanted.
        progress: Called with the counts after every file that has an address of its own.

    Returns:
        How many of those ended how; why is in ROOT/download-failed.jsonl.

    Raises:
        DataError: the data set is at no known place, or ``fetch_repository`` or ``unpack`` fail.
    """
    if not (adapter.hub_id or adapter.urls):
        raise DataError("this data set is on no hub; get it by hand and give its folder as --root")
    root.mkdir(parents=True, exist_ok=True)
    if adapter.hub_id:
        fetch_repository(adapter.hub_id, root, files or adapter.hub_files)
        unpack(root)
    if adapter.urls is None:
        return Counter()
    with (root / FAILED_FILE).open("w") as file:
        return fetch_files(
            adapter.urls(root),
            root,
            Limits(),
            progress,
            lambda failure: file.write(failure.model_dump_json() + "\n"),
        )


def fetch_repository(name: str, root: Path, files: Sequence[str]) -> None:
    """Fetches the files of a data set on the hub that match any of the globs.

    Raises:
        DataError: there is no such data set, or its terms must be accepted first.
        TransientError: the hub does not answer.
    """
    try:
        snapshot_download(name, repo_type="dataset", local_dir=root, allow_patterns=list(files))
    except (HFValidationError, HfHubHTTPError) as error:
        raise DataError(
            f"{name} cannot be fetched: {error}; is the name right, are you logged in (hf auth "
            "login), are its terms accepted?"
        ) from None
    except (LocalEntryNotFoundError, OSError, http.client.HTTPException) as error:
        raise TransientError(f"{name}: the hub cannot be reached: {error}") from None


def unpack(root: Path) -> None:
    """Unpacks every .tar.gz below ``root`` beside itself, unless that was done before.

    Raises:
        DataError: one is damaged, or would write outside its folder.
    """
    for path in sorted([*root.rglob("*.tar.gz"), *root.rglob("*.tgz")]):
        marker = path.with_name(path.name + _UNPACKED)
        if marker.exists():
            continue
        try:
            with tarfile.open(path, "r:gz") as archive:
                _extract(archive, path.parent)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path} cannot be unpacked: {error}; download it again") from None
        marker.touch()


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Files alone, each within ``folder``; links and devices stay in the archive.

    Not ``extractall(filter="data")``, which Python has from 3.11.4 on.
    """
    root = folder.resolve()
    for member in archive:
        target = root / member.name
        if not target.resolve().is_relative_to(root):
            raise tarfile.TarError(f"{member.name!r} leads out of its folder")
        content = archive.extractfile(member) if member.isreg() else None
        if content is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)


def fetch_files(
    wanted: Iterable[tuple[str, str]],
    root: Path,
    limits: Limits,
    progress: Callable[[Counter[str]], None],
    fail: Callable[[Failure], object],
) -> Counter[str]:
    """Fetches files by their addresses, several at a time.

    Args:
        wanted: Address, and path below ``root``.
        progress: Called with the counts after every file.
        fail: Called with every file that could not be fetched.

    Returns:
        How many files ended how.
    """
    counts: Counter[str] = Counter()
    for url, outcome in _in_threads(wanted, root, limits):
        counts[outcome.reason if isinstance(outcome, Failure) else outcome] += 1
        if isinstance(outcome, Failure):
            fail(Failure(reason=outcome.reason, error=f"{url[:500]}: {outcome.error}"))
        progress(counts)
    return counts


def _in_threads(
    wanted: Iterable[tuple[str, str]], root: Path, limits: Limits
) -> Iterator[tuple[str, str | Failure]]:
    """Outcomes in the order of the files; only a few files wait at any time."""
    files = iter(wanted)
    waiting: deque[tuple[str, Future[str | Failure]]] = deque()
    with ThreadPoolExecutor(limits.num_threads) as pool:
        while True:
            for url, place in islice(files, 4 * limits.num_threads - len(waiting)):
                waiting.append((url, pool.submit(_outcome, url, root, place, limits)))
            if not waiting:
                return
            url, future = waiting.popleft()
            yield url, future.result()


def _outcome(url: str, root: Path, place: str, limits: Limits) -> str | Failure:
    try:
        path = _path(root, place)
        if path.exists():
            return PRESENT
        _fetch(url, path, limits)
        return FETCHED
    except SampleError as error:
        return Failure(reason="refused", error=str(error))
    except urllib.error.HTTPError as error:
        return Failure(reason=f"HTTP {error.code}", error=str(error.reason))
    except TimeoutError as error:
        return Failure(reason="too slow", error=str(error))
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, ValueError) as error:
        return Failure(reason="no answer", error=str(error))


def _path(root: Path, place: str) -> Path:
    try:
        path, member = parse_ref(place)
    except ValueError as error:
        raise SampleError(str(error)) from None
    if member:
        raise SampleError(f"{place[:200]!r}: expected a file, not a member of an archive")
    return root / path


def _fetch(url: str, path: Path, limits: Limits) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise SampleError("expected http:// or https://")
    deadline = time.monotonic() + limits.total_s
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "saccade"})
        try:
            response = urllib.request.urlopen(request, timeout=limits.stall_s)
        except urllib.error.URLError as error:
            # urllib wraps what the socket says while it connects
            raise (error.reason if isinstance(error.reason, TimeoutError) else error) from None
        with response, temporary.open("wb") as file:
            _copy(response, file.write, limits.max_bytes, deadline)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(
    response: http.client.HTTPResponse,
    write: Callable[[bytes], int],
    max_bytes: int,
    deadline: float,
) -> None:
    declared = int(response.headers.get("Content-Length") or 0)
    num_bytes = 0
    while num_bytes <= max_bytes and declared <= max_bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not complete after {num_bytes} bytes")
        # read1 returns what is there: a trickle must not outlast the deadline
        chunk = response.read1(_CHUNK_BYTES)
        if not chunk:
            if num_bytes < declared:
                raise ConnectionError(f"ended after {num_bytes} of {declared} bytes")
            return
        num_bytes += len(chunk)
        write(chunk)
    raise SampleError(f"more than {max_bytes} bytes")
