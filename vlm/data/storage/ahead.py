"""Asks for ranges of remote shards before their turn: the plan says what will be read.

Neighbouring ranges become one request. What arrives goes to the storage's cache; a read that comes
before its range is there waits for it. Not here: the order of samples (``vlm.data.plan.plan``).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from vlm.data.storage.storage import Storage

#: what may lie between two ranges of one request: less than a request costs
MAX_GAP_BYTES = 64 << 10
#: of one request
MAX_REQUEST_BYTES = 8 << 20

Item = TypeVar("Item")


class Range(NamedTuple):
    """A sample's bytes in a remote shard."""

    location: str
    version: str
    offset: int
    length: int


Fetches = dict[Range, "Future[None]"]


class ReadAhead(Generic[Item]):
    """Passes items on, while the ranges of those that follow are on their way.

    Args:
        ranges: The remote ranges that an item will read; none for local shards.
        connections: Requests at a time.
        max_bytes: Most that is under way or waits in the cache for its turn.
    """

    def __init__(
        self,
        storage: Storage,
        ranges: Callable[[Item], Iterable[Range]],
        connections: int,
        max_bytes: int,
    ) -> None:
        self._storage, self._ranges = storage, ranges
        self._connections, self._max_bytes = connections, max_bytes

    def __call__(self, items: Iterator[Item]) -> Generator[tuple[Item, Fetches]]:
        """Yields each item with its ranges that have been asked for."""
        waiting: deque[tuple[Item, list[Range]]] = deque()
        fetches: Fetches = {}
        num_bytes = 0
        with ThreadPoolExecutor(self._connections, "fetch") as pool:
            try:
                while True:
                    if num_bytes <= self._max_bytes // 2:  # in bulk, so that neighbours meet
                        taken = list(self._take(items, self._max_bytes - num_bytes))
                        num_bytes += sum(r.length for _, ranges in taken for r in ranges)
                        fetches |= self._ask(pool, [r for _, ranges in taken for r in ranges])
                        waiting += taken
                    if not waiting:
                        return
                    item, own = waiting.popleft()
                    num_bytes -= sum(r.length for r in own)
                    yield item, {r: fetches.pop(r) for r in own if r in fetches}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, items: Iterator[Item], num_bytes: int) -> Iterator[tuple[Item, list[Range]]]:
        """The next item, and as many more as there is room for while they have ranges."""
        for item in items:
            ranges = list(self._ranges(item))
            yield item, ranges
            num_bytes -= sum(r.length for r in ranges)
            if num_bytes <= 0 or not ranges:
                return

    def _ask(self, pool: ThreadPoolExecutor, ranges: list[Range]) -> Fetches:
        asked: Fetches = {}
        for group in merge(ranges):
            parts = [(r.offset, r.length) for r in group]
            fetch = pool.submit(self._storage.fetch, group[0].location, parts, group[0].version)
            asked |= dict.fromkeys(group, fetch)
        return asked


def merge(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges in groups of neighbours, each of which one request can get; order is kept within."""
    group: list[Range] = []
    for one in sorted(set(ranges)):
        if group:
            first, last = group[0], group[-1]
            near = one[:2] == last[:2] and one.offset - last.offset - last.length <= MAX_GAP_BYTES
            if near and one.offset + one.length - first.offset <= MAX_REQUEST_BYTES:
                group.append(one)
                continue
            yield group
        group = [one]
    if group:
        yield group
