"""A folder that keeps what was read of remote shards, up to a number of bytes.

One file for each range, named by a hash of shard, version and range, so nothing is ever mixed up;
it appears under its name whole or not at all. All ranks of a host may share the folder. What was
not used for longest goes first. Not here: whether what is kept is right, which the reader knows by
the sample's content hash.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vlm.errors import ConfigError, one_line

log = logging.getLogger(__name__)

#: (shard, version, ...): what a file is named by
Name = tuple[str | int, ...]

#: A process looks at the folder again after it has written this share of the limit, and clears it
#: down to _KEPT of the limit: eight processes at once stay below it.
_LOOK_AGAIN = 1 / 64
_KEPT = 7 / 8
_TEMPORARY = ".tmp"


class RangeCache:
    """Ranges by name; safe to share between threads and processes.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder.expanduser()
        self.max_bytes = max_bytes
        self._written = max_bytes  # so that the first write looks at what is there
        self._lock = threading.Lock()
        self._failed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"data.storage.cache_dir {self.folder}: {error.strerror}; expected a folder that "
                "can be written"
            ) from None

    def get(self, name: Name) -> bytes | None:
        """The bytes of a name, or None."""
        path = self._path(name)
        try:
            found = path.read_bytes()
            os.utime(path)  # used just now
        except FileNotFoundError:
            return None
        return found

    def has(self, name: Name) -> bool:
        return self._path(name).exists()

    def put(self, name: Name, body: memoryview) -> None:
        """Keeps ``body``. A full disk stops nothing: it is said once."""
        try:
            self._write(self._path(name), lambda path: path.write_bytes(body))
        except OSError as error:
            if not self._failed:
                log.warning("cache %s: %s; going on without it", self.folder, one_line(error))
            self._failed = True

    def drop(self, name: Name) -> None:
        self._path(name).unlink(missing_ok=True)

    def whole(self, name: Name, download: Callable[[Path], None]) -> Path:
        """The file of a name, fetched by one process of the host while the others wait for it.

        Raises:
            OSError: ``download`` failed, or the folder is full.
        """
        path = self._path(name)
        with (self.folder / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                os.utime(path)
            else:
                self._write(path, download)
        return path

    def num_bytes(self) -> int:
        """Bytes kept now."""
        return sum(size for _, size, _ in self._files())

    def _path(self, name: Name) -> Path:
        digest = hashlib.sha256(json.dumps(name).encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _write(self, path: Path, fill: Callable[[Path], object]) -> None:
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(_TEMPORARY, "", path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            fill(temporary)
            size = temporary.stat().st_size
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._written += size
            if self._written < self.max_bytes * _LOOK_AGAIN:
                return
            self._written = 0
        self._evict()

    def _evict(self) -> None:
        """Removes what was not used for longest until the folder is small enough."""
        with (self.folder / "evict.lock").open("w") as lock:
            # whoever is at it did not see what was written meanwhile; to wait bounds that
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= self.max_bytes * _KEPT:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[float, int, str]]:
        """(when used, bytes, path) of every file, half-written ones of killed processes too."""
        found = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # another process removed it
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, entry.path))
        return found
