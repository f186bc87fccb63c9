"""What sources hold and how much of an epoch is theirs: halves, filters, weights, repeats, caps.

Exact fractions throughout: a share is what the recipe says, not what floats make of it. Not here:
which rows a window takes (``vlm.data.plan.mixture``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from vlm.data.plan.policy import Policy, Rows, SourcePolicy
from vlm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Half:
    """The samples of a source that have frames, or its text-only ones; at least one."""

    #: number of the source
    source: int
    first_row: int
    #: bool, over the rows of the source
    chosen: np.ndarray
    #: of the chosen rows; tokens with placeholders of frames
    num_rows: int
    num_tokens: int
    num_frames: int

    def unit(self, by: Literal["samples", "tokens", "frames"]) -> Fraction:
        """What a row has in the mean of that which weights are shares of."""
        if by == "samples" or self.num_frames == 0 and by == "frames":
            return Fraction(1)
        return Fraction(self.num_tokens if by == "tokens" else self.num_frames, self.num_rows)


def halves(rows: Rows, policy: Policy) -> tuple[list[Half], list[Half]]:
    """Main and text halves of the sources that have them. Text alone is main.

    Raises:
        ConfigError: filters leave nothing, or no text where the policy wants some.
        DataError: rows that are not in shard order.
    """
    main: list[Half] = []
    text: list[Half] = []
    for index, source in enumerate(policy.sources):
        start, stop = int(rows.first_rows[index]), int(rows.first_rows[index + 1])
        if (rows.shard[start + 1 : stop] < rows.shard[start : stop - 1]).any():
            raise DataError(
                f"source {source.name}: the manifest's rows are not in the order of its shards; "
                "build it again"
            )
        own = slice(start, stop)
        is_text = rows.kind[own] == 0
        fits = _fits(rows, own, source) & ~is_text
        for found, chosen in ((main, fits), (text, is_text)):
            num_rows = int(np.count_nonzero(chosen))
            if num_rows:
                frames = int(rows.num_frames[own].sum(dtype=np.int64, where=chosen))
                tokens = int(rows.num_tokens[own].sum(dtype=np.int64, where=chosen))
                tokens += policy.tokens_per_frame * frames
                found.append(Half(index, start, chosen, num_rows, tokens, frames))
    if not main and not text:
        raise ConfigError(
            "min_frames and max_frames of data.train leave no sample; widen them, or take other "
            "manifests"
        )
    if not main:
        return text, []
    if policy.text_frac == 0:
        return main, []
    if not text:
        raise ConfigError(
            f"data.text_frac={policy.text_frac}, but the manifest holds no text-only samples; "
            "add some or set data.text_frac=0"
        )
    return main, text


def _fits(rows: Rows, own: slice, source: SourcePolicy) -> np.ndarray:
    """Where a sample has as many frames as the source asks for, before images are repeated."""
    frames = rows.num_frames[own]
    if source.min_frames == 0 and source.max_frames is None:
        return np.ones(len(frames), bool)
    repeats = np.where(rows.kind[own] == 1, source.image_frames, 1)
    most = math.inf if source.max_frames is None else source.max_frames
    return (frames >= source.min_frames * repeats) & (frames <= most * repeats)


def decimal(number: float) -> Fraction:
    """The number that the recipe holds, which no float is."""
    return Fraction(str(number))


def amounts(
    own: Sequence[Half],
    weights: Sequence[float | None],
    policy: Policy,
    total: Fraction | None = None,
) -> list[Fraction]:
    """Rows of each half in an epoch.

    Args:
        weights: Of each source of the policy; None: in proportion to ``repeat`` times its size.
        total: Of all; None: as many as there are, within caps.

    Raises:
        ConfigError: all weights are 0, or caps allow fewer than ``total``.
    """
    sources = [policy.sources[half.source] for half in own]
    caps = [math.inf if source.cap is None else source.cap for source in sources]
    ratios: list[Fraction] = []
    sizes: list[Fraction] = []
    for half, source, cap in zip(own, sources, caps, strict=True):
        weight = weights[half.source]
        passes = half.num_rows * decimal(source.repeat)
        ratios.append(passes if weight is None else decimal(weight) / half.unit(policy.weight_by))
        size = passes if weight is None else Fraction(half.num_rows)
        sizes.append(Fraction(min(size, cap)) if ratios[-1] else Fraction(0))
    names = ", ".join(source.name for source in sources)
    if not any(ratios):
        raise ConfigError(
            f"the weights of {names} are all 0, and no other source has such samples; give one "
            "of them a weight"
        )
    wanted = sum(sizes, Fraction(0)) if total is None else total
    found = _fill(ratios, caps, wanted)
    if sum(found) != wanted:
        raise ConfigError(
            f"data.text_frac asks for {math.ceil(wanted)} text-only samples an epoch, but the caps "
            f"of {names} allow {math.floor(sum(found))}; raise a cap or lower data.text_frac"
        )
    return found


def _fill(ratios: Sequence[Fraction], caps: Sequence[float], total: Fraction) -> list[Fraction]:
    """``total`` shared out by ``ratios``; what a cap keeps from one goes to the others, as far as
    theirs allow."""
    found = [Fraction(0) for _ in ratios]
    free = [i for i, ratio in enumerate(ratios) if ratio]
    while free:
        scale = (total - sum(found)) / sum(ratios[i] for i in free)
        full = [i for i in free if ratios[i] * scale > caps[i]]
        for i in full or free:
            found[i] = Fraction(int(caps[i])) if full else ratios[i] * scale
        free = [i for i in free if i not in full] if full else []
    return found
