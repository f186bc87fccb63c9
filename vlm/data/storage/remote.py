"""Requests for shards at s3://, hf:// and http(s)://, through fsspec: ranges, whole files, sizes.

Nothing of a URL but scheme, host and path ever reaches a message: what stands before an ``@`` or
behind a ``?`` may be a credential. Not here: trying again (``vlm.data.storage.storage``).
"""

import errno
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

from vlm.errors import ConfigError, DataError, one_line

#: scheme -> the package that reads it, and how to get it
_PACKAGES = {
    "s3": ("s3fs", "pip install 'saccade[s3]'"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
    "http": ("aiohttp", "pip install 'saccade[http]'"),
    "https": ("aiohttp", "pip install 'saccade[http]'"),
}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()\[\]]+")
_DENIED = (401, 403)
#: what file systems call a file's version: S3 and HTTP, the Hub
_VERSIONS = ("ETag", "blob_id")


class NoRanges(Exception):
    """The server sends files whole or not at all."""


def is_remote(location: str) -> bool:
    """Whether a shard's location is a URL; else it is a local path."""
    return "://" in location


def display(location: str) -> str:
    """A location for messages: a URL without user, password, query and fragment."""
    if not is_remote(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def reason(error: BaseException) -> str:
    """What a failed read says, in short, with every URL in it made safe to show."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error)
    text = one_line(_URL.sub(lambda found: display(found[0]), text).partition("\n")[0])
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def faults(location: str) -> tuple[type[Exception], ...]:
    """What reading a location raises when it fails for a reason that may pass."""
    if not is_remote(location):
        return (OSError,)
    scheme = _scheme(location)
    found: list[type[Exception]] = [OSError]
    # optional packages, and only that of the scheme is there
    if scheme in ("http", "https", "s3"):
        found.append(importlib.import_module("aiohttp").ClientError)
    if scheme == "s3":
        found.append(importlib.import_module("botocore.exceptions").BotoCoreError)
    if scheme == "hf":
        # its base class is of whichever HTTP client the installed version is built on
        bases = importlib.import_module("huggingface_hub.errors").HfHubHTTPError.__mro__
        found += [base for base in bases if base.__name__ == "HTTPError"]
    return tuple(found)


def check_allowed(location: str, error: Exception) -> None:
    """Raises DataError where a remote ``error`` says that access is denied: waiting is no help."""
    if not is_remote(location):
        return
    status = vars(error).get("status")  # aiohttp's
    if isinstance(error, PermissionError) or status in _DENIED or "NoCredentials" in repr(error):
        raise DataError(
            f"shard {display(location)}: access denied ({reason(error)}); check the credentials "
            "in the environment"
        )


class State(NamedTuple):
    """What a server says of a file without sending it."""

    num_bytes: int
    #: another one whenever the file has changed; empty where the server does not tell
    version: str


@dataclass(frozen=True)
class RemoteFile:
    """One remote shard. Opening it asks the server nothing."""

    filesystem: Any
    path: str

    def state(self) -> State:
        """Size and version of the file.

        Raises:
            DataError: the server does not say how large it is.
        """
        info = self.filesystem.info(self.path)
        if info["size"] is None:
            raise DataError(f"shard {display(self.path)}: the server does not tell its size")
        told = [str(info[name]) for name in _VERSIONS if info.get(name)]
        return State(int(info["size"]), told[0] if told else "")

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset`` in one request, fewer at the end.

        Raises:
            NoRanges: the server would send the whole file.
        """
        # a size is needed to open without a request; what lies behind the range does not matter
        file = self.filesystem.open(self.path, "rb", cache_type="none", size=offset + length)
        try:
            file.seek(offset)
            return bytes(file.read(length))
        except ValueError as error:
            if "range requests" in str(error):  # fsspec has no class for it
                raise NoRanges from None
            raise
        except OSError as error:
            if error.errno == errno.EINVAL:  # S3: the range starts behind the end
                return b""
            raise
        finally:
            file.close()

    def download(self, target: Path) -> None:
        """Writes the whole file to ``target``, in pieces.

        Raises:
            OSError: the connection ended before the file did.
        """
        size = self.filesystem.info(self.path)["size"]
        self.filesystem.get_file(self.path, str(target))
        found = target.stat().st_size
        if size is not None and found != size:
            raise OSError(errno.EIO, f"{found} of {size} bytes arrived")


def open_file(location: str, timeout_s: float) -> RemoteFile:
    """The file at a URL.

    Raises:
        ConfigError: no such scheme, or its package is not installed.
    """
    scheme = _scheme(location)
    filesystem, path = fsspec.core.url_to_fs(location, **_options(scheme, timeout_s))
    return RemoteFile(filesystem, path)


def list_tars(location: str, timeout_s: float) -> list[str]:
    """The ``*.tar`` directly below a URL, sorted; of a URL that ends in ``.tar``, itself."""
    if urlsplit(location).path.endswith(".tar"):
        return [location]
    folder = open_file(location, timeout_s)
    names = folder.filesystem.ls(folder.path, detail=False)
    found = sorted(str(name) for name in names if urlsplit(str(name)).path.endswith(".tar"))
    return [name if is_remote(name) else folder.filesystem.unstrip_protocol(name) for name in found]


def check_scheme(location: str) -> str:
    """The scheme of a URL, one that shards are read from; else ConfigError."""
    scheme = urlsplit(location).scheme
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise ConfigError(f"shard {display(location)}: expected a local path or one of {known}")
    return scheme


def _scheme(location: str) -> str:
    scheme = check_scheme(location)
    package, remedy = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"shard {display(location)}: needs the package {package}; {remedy}")
    return scheme


def _options(scheme: str, timeout_s: float) -> dict[str, Any]:
    """Timeouts, as each package takes them. Trying again is ours, so theirs is off."""
    if scheme == "s3":
        retries = {"total_max_attempts": 1}
        return {
            "config_kwargs": {
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
                "retries": retries,
            },
            "use_listings_cache": False,
        }
    if scheme in ("http", "https"):
        aiohttp = importlib.import_module("aiohttp")  # optional
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        # what is in a tar is compressed already, and sizes must be those of the file
        return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}
    return {}  # huggingface_hub reads HF_HUB_DOWNLOAD_TIMEOUT, 10 s by default
