"""What of a micro-batch its operations follow from: its shapes, with padding and without.

Not here: what any model makes of them (``vlm.models.flops.counters``).

Legend: S samples, F frames, N tokens, L longest sample.
"""

from typing import NamedTuple

import torch

from vlm.batch import Batch
from vlm.models.latent_layout import Order


class Shapes(NamedTuple):
    """All of a micro-batch that its cost follows from."""

    #: tokens of each sample, placeholders included
    lengths: tuple[int, ...]
    #: tokens of each sample up to its last frame; 0 without one
    prefixes: tuple[int, ...]
    #: frames of each sample
    frames: tuple[int, ...]
    num_loss_tokens: int
    #: height and width of frames, px
    frame_size: tuple[int, int]

    @property
    def num_frames(self) -> int:
        """Owned by samples; 0 if a blank one stands in."""
        return sum(self.frames)


def shapes_of(batch: Batch) -> Shapes:
    """Reads them on the host: call it with a batch that is not on a GPU yet."""
    owned = batch.cu_frames.diff()
    prefixes = torch.zeros_like(owned)
    if batch.has_frames:
        per_frame = len(batch.frame_index) // int(batch.cu_frames[-1])
        last = batch.frame_index[batch.cu_frames[1:][owned > 0] * per_frame - 1]
        prefixes[owned > 0] = batch.position_ids[last] + 1
    height, width = batch.frames.shape[-2:]
    return Shapes(
        lengths=tuple(batch.cu_seqlens.diff().tolist()),
        prefixes=tuple(prefixes.tolist()),
        frames=tuple(owned.tolist()),
        num_loss_tokens=batch.num_loss_tokens,
        frame_size=(height, width),
    )


class Pass(NamedTuple):
    """What goes through the language model at once, or what it looks at."""

    tokens: int
    #: of a query and a key
    pairs: float


class Work(NamedTuple):
    num_frames: int
    num_loss_tokens: int
    frame_size: tuple[int, int]
    full: Pass
    prefix: Pass
    #: the whole of it when frames are read one after another
    stepped: Pass
    #: frames that the tokens of a sample look at, where they stand beside the text, and their pairs
    context: Pass


def laid_out(shapes: Shapes, order: Order) -> Shapes:
    """Of ``vlm.models.latent_layout.lay_out``, which gives each frame one placeholder."""
    rows = []
    for length, frames in zip(shapes.lengths, shapes.frames, strict=True):
        text = length - frames
        before = {"text first": text, "no text": 1, "frames first": 0}[order]
        behind = 1 + text if order == "frames first" else 0
        rows.append((before + 1 + frames + behind, before + 1 + frames if frames else 0))
    lengths, prefixes = zip(*rows, strict=True)
    scored = shapes.num_loss_tokens if order == "frames first" else 0
    return shapes._replace(lengths=lengths, prefixes=prefixes, num_loss_tokens=scored)


def executed(shapes: Shapes, flat: bool, longest: int | None = None) -> Work:
    """With padding, and a blank frame where there is none.

    Args:
        longest: length of rows; None: that of the longest sample.
    """
    longest, prefix = longest or max(shapes.lengths), max(1, *shapes.prefixes)
    if flat:
        full = _flat(shapes.lengths)
        reach = _flat(tuple(min(length, prefix) for length in shapes.lengths))
    else:
        full = _flat((longest,) * len(shapes.lengths))
        reach = _flat((prefix,) * len(shapes.lengths))
    read = prefix if shapes.num_frames else 0
    stepped = [_stepped(longest, read)] * len(shapes.lengths)
    beside = max(1, *shapes.frames) * len(shapes.lengths)
    return Work(
        max(1, shapes.num_frames),
        shapes.num_loss_tokens,
        shapes.frame_size,
        full,
        reach,
        Pass(longest * len(shapes.lengths), sum(stepped)),
        Pass(beside, float(longest * beside)),
    )


def needed(shapes: Shapes) -> Work:
    stepped = map(_stepped, shapes.lengths, shapes.prefixes)
    return Work(
        shapes.num_frames,
        shapes.num_loss_tokens,
        shapes.frame_size,
        _flat(shapes.lengths),
        _flat(shapes.prefixes),
        Pass(sum(shapes.lengths), sum(stepped)),
        Pass(
            shapes.num_frames,
            float(sum(n * f for n, f in zip(shapes.lengths, shapes.frames, strict=True))),
        ),
    )


def _flat(lengths: tuple[int, ...]) -> Pass:
    return Pass(sum(lengths), float(sum(length**2 for length in lengths)))


def _stepped(length: int, prefix: int) -> float:
    """Pairs of a sample that is read token by token up to its last frame, then at once."""
    return prefix * (prefix + 1) / 2 + (length - prefix) * length
