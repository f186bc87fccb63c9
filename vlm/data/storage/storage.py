"""Bytes of shards, wherever they lie: local files, or objects at s3://, hf:// and http(s)://.

A shard that cannot be reached for a while (a file system that went away, a server that stalls or
resets) is tried again, with warnings, up to a bound, and then is a ``TransientError``: never a bad
sample. Not here: the requests themselves (``vlm.data.storage.remote``), what is kept of them
(``vlm.data.storage.cache``), what is asked for ahead (``vlm.data.storage.ahead``), what the bytes
mean.
"""

import logging
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vlm.data.storage import remote
from vlm.data.storage.cache import RangeCache
from vlm.data.storage.waits import Waits
from vlm.errors import TransientError

log = logging.getLogger(__name__)

#: local shards that stay open: about those of one window of a plan, far from the usual 1024 files
MAX_OPEN_SHARDS = 256

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a shard that cannot be reached is waited for."""

    #: for one request to answer, and then for each next part of the answer
    timeout_s: float = 60.0
    #: over all attempts
    give_up_s: float = 900.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0


class Stopped(Exception):
    """The storage was closed while it waited."""


class Storage:
    """Reads ranges of shards; safe to share between threads.

    Args:
        cache: Keeps what was read of remote shards; without one every read is a request.
    """

    def __init__(self, patience: Patience | None = None, cache: RangeCache | None = None) -> None:
        self.patience = patience or Patience()
        self.cache = cache
        #: what is being read right now, for the watchdog
        self.waits = Waits()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # not the global generator, whose state is part of a checkpoint
        self._jitter = random.Random()

    def read(
        self,
        location: str,
        offset: int,
        length: int,
        version: str = "",
        place: memoryview | None = None,
    ) -> bytes | memoryview:
        """``length`` bytes at ``offset``, fewer where the shard ends before.

        Args:
            location: An absolute path or a URL.
            version: Changes with the shard's content, so that the cache never mixes two of them.
            place: (length,) memory that may be used for them.

        Raises:
            TransientError: the shard could not be reached for ``patience.give_up_s``.
            ConfigError: the URL needs a package that is not installed.
            DataError: the server refuses access.
        """
        with self.waits.on(f"shard {remote.display(location)} at byte {offset}"):
            if not remote.is_remote(location):
                return self._patiently(
                    location, lambda: self._read_file(location, offset, length, place)
                )
            return self._read_remote(location, offset, length, version)

    def fetch(self, location: str, parts: list[tuple[int, int]], version: str) -> None:
        """Brings ranges (offset, length) of a remote shard into the cache, with one request.

        Args:
            parts: Ascending, not overlapping; what lies between them is read and dropped.
        """
        assert self.cache is not None
        missing = [part for part in parts if not self.cache.has((location, version, *part))]
        if not missing:
            return
        start, stop = missing[0][0], sum(missing[-1])
        with self.waits.on(f"shard {remote.display(location)} at byte {start}, ahead"):
            found = memoryview(self._request(location, start, stop - start, version))
        for offset, length in missing:
            body = found[offset - start : offset - start + length]
            if len(body) == length:  # one that is cut short is for ``read`` to find
                self.cache.put((location, version, offset, length), body)

    def forget(self, location: str, offset: int, length: int, version: str) -> None:
        """Drops a range from the cache, whose copy may be damaged."""
        if self.cache is not None and remote.is_remote(location):
            self.cache.drop((location, version, offset, length))

    def state(self, location: str) -> remote.State:
        """Size and version of a remote shard."""
        return self._patiently(location, lambda: self._open(location).state())

    def list_tars(self, location: str) -> list[str]:
        """See ``remote.list_tars``."""
        timeout_s = self.patience.timeout_s
        return self._patiently(location, lambda: remote.list_tars(location, timeout_s))

    @contextmanager
    def whole(self, location: str) -> Iterator[Path]:
        """A shard as a local file; a remote one is downloaded for as long as the block lasts."""
        if not remote.is_remote(location):
            yield Path(location)
            return
        with tempfile.TemporaryDirectory(prefix="saccade-") as folder:
            path = Path(folder) / "shard.tar"
            self._patiently(location, lambda: self._open(location).download(path))
            yield path

    def close(self) -> None:
        """Closes files and ends waiting; reading again opens what it needs."""
        self._closed.set()
        with self._lock:
            self._files.clear()

    def reopen(self) -> None:
        """Undoes ``close``."""
        self._closed.clear()

    def _read_file(
        self, location: str, offset: int, length: int, place: memoryview | None
    ) -> bytes | memoryview:
        with self._lock:
            file = self._files.get(location)
            if file is not None:
                self._files.move_to_end(location)
        if file is None:
            file = _OpenFile(os.open(location, os.O_RDONLY | os.O_CLOEXEC))
            with self._lock:
                self._files[location] = file
                while len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)
        try:
            if place is None:
                return os.pread(file.fd, length, offset)
            return place[: os.preadv(file.fd, [place], offset)]
        except OSError:
            with self._lock:  # a stale handle never recovers, the path may
                self._files.pop(location, None)
            raise

    def _read_remote(self, location: str, offset: int, length: int, version: str) -> bytes:
        name = (location, version, offset, length)
        if self.cache is not None and (kept := self.cache.get(name)) is not None:
            return kept
        found = self._request(location, offset, length, version)
        if self.cache is not None and len(found) == length:
            self.cache.put(name, memoryview(found))
        return found

    def _request(self, location: str, offset: int, length: int, version: str) -> bytes:
        def attempt() -> bytes:
            try:
                return self._open(location).read(offset, length)
            except remote.NoRanges:
                return self._read_downloaded(location, offset, length, version)

        return self._patiently(location, attempt)

    def _read_downloaded(self, location: str, offset: int, length: int, version: str) -> bytes:
        """From a copy of the whole shard, whose server sends it whole or not at all."""
        if self.cache is None:
            with self.whole(location) as path, path.open("rb") as file:
                return os.pread(file.fileno(), length, offset)
        path = self.cache.whole((location, version), self._open(location).download)
        with path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def _open(self, location: str) -> remote.RemoteFile:
        return remote.open_file(location, self.patience.timeout_s)

    def _patiently(self, location: str, action: Callable[[], Result]) -> Result:
        patience, shown = self.patience, remote.display(location)
        deadline = time.monotonic() + patience.give_up_s
        wait_s, attempts = patience.first_wait_s, 0
        while True:
            attempts += 1
            try:
                return action()
            except remote.faults(location) as error:
                remote.check_allowed(location, error)
                reason = remote.reason(error)
            pause_s = wait_s * self._jitter.uniform(0.75, 1.25)
            if time.monotonic() + pause_s > deadline:
                raise TransientError(
                    f"shard {shown}: {reason}; {attempts} attempts in {patience.give_up_s:g} s; is "
                    "the file system mounted, the server up, the shard still there?"
                )
            log.warning("shard %s: %s; trying again in %.1f s", shown, reason, pause_s)
            if self._closed.wait(pause_s):
                raise Stopped(f"shard {shown}: closed while waiting")
            wait_s = min(2 * wait_s, patience.longest_wait_s)


class _OpenFile:
    """Closed by whoever lets go of it last: no thread loses the file it reads from."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)
