"""Loss by source and by kind of sample, over the steps since the last row of the metrics.

Not here: where the sums come from (``vlm.engine.tally``).
"""

from collections.abc import Iterable, Sequence


class GroupLosses:
    """Adds up groups; ``groups`` are the (source, kind) of each."""

    def __init__(self, groups: Sequence[tuple[str, str]]) -> None:
        self._names = [(f"loss_source_{source}", f"loss_{kind}") for source, kind in groups]
        #: one for each source; kinds have columns in every run
        self.source_columns = tuple(dict.fromkeys(source for source, _ in self._names))
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, found: Iterable[tuple[float, float]]) -> None:
        """Sum and number of the learned tokens of each group, in one global step."""
        for names, (loss, tokens) in zip(self._names, found, strict=True):
            for name in names:
                known = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (known[0] + loss, known[1] + tokens)

    def take(self) -> dict[str, float]:
        """Mean per token by column; those that had no token are left out."""
        found, self._sums = self._sums, {}
        return {name: loss / tokens for name, (loss, tokens) in found.items() if tokens}
