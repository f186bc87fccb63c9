"""What a plan is made of: the columns it reads of the samples, and the policy it follows.

Both are checked here, once, before any step exists. Not here: the steps (``vlm.data.plan.plan``),
and where rows and policy come from (``vlm.data.plan.planning``).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlm.errors import DataError

#: a row's kind is a position here, as in the manifest
KINDS = ("text", "image", "video")

_CHUNK = 1 << 20  # rows checked at a time, so that memory stays bounded


@dataclass(frozen=True, kw_only=True)
class SourcePolicy:
    """How much of a source is trained on."""

    name: str = "train"
    #: share among the sources, see ``Policy.weight_by``; None: as many as there are
    weight: float | None = None
    #: passes in an epoch, where there are no weights
    repeat: float = 1.0
    #: most samples in an epoch
    cap: int | None = None
    #: samples with frames that have fewer, or more, are left out
    min_frames: int = 0
    max_frames: int | None = None
    #: frames that an image is shown as
    image_frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How rows become steps."""

    seed: int
    batching: Literal["bucketed", "packed"]
    #: M, micro-batches of a global step over all ranks
    micro_batches: int
    #: most that a micro-batch may cost as executed, in tokens
    budget: float
    #: what a frame costs beside its tokens, in tokens
    frame_cost: float
    tokens_per_frame: int
    #: share of text-only samples among all samples
    text_frac: float
    #: rows of the main stream in a window, at least
    window: int
    loss_on: Literal["answers", "all", "preference"]
    sources: tuple[SourcePolicy, ...] = (SourcePolicy(),)
    #: what weights are shares of; of text-only samples, which have no frames, at least samples
    weight_by: Literal["samples", "tokens", "frames"] = "samples"
    #: (global step, weights of all sources from there on), ascending
    weights_at: tuple[tuple[int, tuple[float, ...]], ...] = ()
    #: share of samples whose question stands before their frames
    question_first_frac: float = 0.0
    #: where texts are cut
    max_text_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """What the plan knows of the samples: arrays of one length, in the order of the shards."""

    #: as shown: an image may stand for several
    num_frames: np.ndarray
    #: text tokens, without placeholders of frames
    num_tokens: np.ndarray
    #: positions in ``KINDS``
    kind: np.ndarray
    shard: np.ndarray
    #: text tokens with a label
    num_loss_tokens: np.ndarray
    #: (K+1,) first row of each source, and the number of rows
    first_rows: np.ndarray

    def source_range(self, row: int) -> tuple[int, int]:
        """The first row of a row's source, and the one after its last."""
        index = int(np.searchsorted(self.first_rows, row, "right"))
        return int(self.first_rows[index - 1]), int(self.first_rows[index])

    def __len__(self) -> int:
        return len(self.kind)

    def sizes(self, rows: np.ndarray, tokens_per_frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths in tokens, placeholders included, and frames of ``rows``; int64."""
        frames = self.num_frames[rows].astype(np.int64)
        return self.num_tokens[rows].astype(np.int64) + tokens_per_frame * frames, frames


def check(rows: Rows, chosen: np.ndarray, policy: Policy) -> int:
    """Refuses rows that no plan can use.

    Args:
        chosen: (n,) bool, the rows that the plan uses.

    Returns:
        How many of them cost at most half the budget.

    Raises:
        DataError: no tokens, a kind that contradicts the frames, or more cost than the budget.
    """
    num_heavy = num_light = 0
    worst, worst_cost = -1, policy.budget
    for start in range(0, len(rows), _CHUNK):
        own = start + np.flatnonzero(chosen[start : start + _CHUNK])
        if not len(own):
            continue
        lengths, frames = rows.sizes(own, policy.tokens_per_frame)
        _check_kinds(own, rows.kind[own], lengths, frames)
        costs = lengths + policy.frame_cost * frames
        num_heavy += int((costs > policy.budget).sum())
        num_light += int((costs <= policy.budget / 2).sum())
        if costs.max() > worst_cost:
            worst, worst_cost = int(own[costs.argmax()]), float(costs.max())
    if num_heavy:
        raise DataError(
            f"{num_heavy} samples cost more than data.budget={policy.budget:g}; the worst, "
            f"manifest row {worst}, has {rows.num_frames[worst]} frames and "
            f"{rows.num_tokens[worst]} text tokens and costs {worst_cost:g}; raise data.budget "
            "or take such samples out"
        )
    return num_light


def _check_kinds(
    rows: np.ndarray, kinds: np.ndarray, lengths: np.ndarray, frames: np.ndarray
) -> None:
    wrong = (kinds >= len(KINDS)) | ((kinds == 0) != (frames == 0)) | (lengths == 0)
    if wrong.any():
        i = int(wrong.argmax())
        raise DataError(
            f"manifest row {rows[i]}: kind {kinds[i]}, {frames[i]} frames and {lengths[i]} tokens; "
            "expected kind 0 without frames, or 1 or 2 with some, and tokens; build it again"
        )
