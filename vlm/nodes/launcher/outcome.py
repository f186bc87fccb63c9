"""How an attempt ended: what failed first, where, with what code. Pure.

Not here: what is done about it (``vlm.nodes.launcher.restart``).
"""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlm.errors import EXIT_FAULTS
from vlm.nodes.launcher.connection import Place, first_ranks


@dataclass(frozen=True)
class Fault:
    """What failed first; ``rank`` None: the host, or the connection to it; ``host`` None: all."""

    host: str | None
    rank: int | None
    reason: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``code`` is the first failing rank's, 128 + n for a signal; 0: all ranks said 0.

    Attributes:
        lost: hosts whose connection was lost, in any order of time.
        hung: no rank did a step for too long.
    """

    code: int
    fault: Fault | None
    lost: frozenset[str]
    hung: bool = False


def exit_code(code: int) -> int:
    """As a shell has it."""
    return 128 - code if code < 0 else code


def in_words(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Tally:
    """Counts how ranks and hosts end, in the order in which that is heard."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._first_ranks = first_ranks(places)
        self._first: tuple[int, Fault] | None = None
        self._done: set[int] = set()
        self._lost: set[int] = set()
        #: hosts of which a rank has ended with what only its agent will say; it may be the first
        self._unknown: set[int] = set()
        self._hung = False

    @property
    def failed(self) -> bool:
        return self._first is not None

    def ended(self, index: int, rank: int, code: int | None, lines: Sequence[str]) -> None:
        """``code`` None: it has ended, the host will say with what."""
        if code is None:
            self._unknown.add(index)
        elif code and index not in self._unknown:
            self._fail(index, rank, exit_code(code), in_words(code), lines)

    def done(self, index: int, failed: Iterable[tuple[int, int, Sequence[str]]]) -> None:
        """All ranks of a host have ended.

        Args:
            failed: rank, exit code and last lines of each that the host's agent holds for failed.
        """
        self._done.add(index)
        for rank, code, lines in failed:
            self._fail(index, rank, exit_code(code), in_words(code), lines)

    def lose(self, index: int, reason: str) -> None:
        """A host is gone before its ranks have ended."""
        if index not in self._done and index not in self._lost:
            self._lost.add(index)
            self._fail(index, None, EXIT_FAULTS, reason)

    def hung(self, rank: int | None, reason: str, lines: Iterable[str]) -> None:
        self._hung = True
        index = None if rank is None else self._host_of(rank)
        self._fail(index, rank, EXIT_FAULTS, reason, tuple(lines))

    def outcome(self) -> Outcome:
        lost = frozenset(self._places[index].host.name for index in self._lost)
        if self._first is None:
            return Outcome(0, None, lost)
        code, fault = self._first
        return Outcome(code, fault, lost, self._hung)

    def _host_of(self, rank: int) -> int:
        return max(i for i, first in enumerate(self._first_ranks) if first <= rank)

    def _fail(
        self,
        index: int | None,
        rank: int | None,
        code: int,
        reason: str,
        lines: Sequence[str] = (),
    ) -> None:
        if self._first is None:
            host = None if index is None else self._places[index].host.name
            self._first = (code, Fault(host, rank, reason, tuple(lines)))
