"""Shards by location, an absolute path or a URL: finding them, and reading each as a whole.

For tools that read every byte of a shard: a remote one is downloaded for as long as it is open, but
only once a byte of it is asked for. Not here: reading single samples of it
(`vlm.data.load.reader`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from vlm.data.format import shards
from vlm.data.format.shards import ShardFile
from vlm.data.storage import remote
from vlm.data.storage.storage import Storage
from vlm.errors import ConfigError, DataError


def find_shards(places: Sequence[str], storage: Storage | None = None) -> list[str]:
    """The tars among ``places`` and in the folders among them, each once, sorted; local first.

    Args:
        places: Paths, or URLs at s3://, hf:// or http(s)://.

    Raises:
        DataError: a path that does not exist, or a folder without tars.
        ConfigError: a URL with a password, or one that nothing here can read.
        TransientError: a server could not be reached for long.
    """
    storage = storage or Storage()
    local = [Path(place) for place in places if not remote.is_remote(place)]
    found: set[str] = set()
    for url in filter(remote.is_remote, places):
        if "@" in urlsplit(url).netloc:
            raise ConfigError(
                f"shard {remote.display(url)}: its URL holds a user or password, which the "
                "manifest would show to all; put credentials into the environment"
            )
        tars = storage.list_tars(url)
        if not tars:
            raise DataError(f"{remote.display(url)}: holds no *.tar")
        found.update(tars)
    return [*map(str, shards.find_shards(local)), *sorted(found)]


@contextmanager
def open_shard(location: str, storage: Storage | None = None) -> Iterator[ShardFile]:
    """``shards.open_shard``, of a URL too.

    Raises:
        DataError: a local one cannot be opened, or a server does not tell its size.
        TransientError: a server could not be reached for long.
    """
    if not remote.is_remote(location):
        with shards.open_shard(Path(location)) as local:
            yield local
        return
    storage = storage or Storage()
    state = storage.state(location)
    with ExitStack() as stack:
        opened: list[ShardFile] = []

        def read(offset: int, length: int) -> bytes | memoryview:
            if not opened:
                path = stack.enter_context(storage.whole(location))
                opened.append(stack.enter_context(shards.open_shard(path)))
            return opened[0].read(offset, length)

        yield ShardFile(read, state.num_bytes, state.version)
