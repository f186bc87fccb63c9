"""Where the tokens of a sample stand for a model with mode tokens, given any batch.

"text first"    [text, mode, frames]
"no text"       [no_text, mode, frames]
"frames first"  [mode, frames, end, text]

Only indices are made, on the batch's device and without waiting for it.

Legend: N tokens before, M after, F frames, S samples.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Batch
from vlm.models.language import coordinates

Order = Literal["text first", "no text", "frames first"]
#: most learned tokens that a sample gets beside its own
MARKERS = 2


class Layout(NamedTuple):
    #: laid out anew: ids where text stands and 0 elsewhere, targets with "frames first" only
    batch: Batch
    #: (S,) where the mode tokens stand, right before a sample's first frame
    mode_index: Tensor
    #: (S,) or (0,)
    end_index: Tensor
    #: (S,) or (0,)
    no_text_index: Tensor


def lay_out(batch: Batch, order: Order) -> Layout:
    """A batch with one placeholder for each frame, laid out anew."""
    row, _ = coordinates(batch)
    is_frame = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    is_frame[batch.frame_index] = True
    frames = batch.cu_frames.diff()
    text = batch.cu_seqlens.diff() - frames
    before = {"text first": text, "no text": torch.ones_like(text)}.get(order, 0 * text)
    behind = 1 + text if order == "frames first" else 0 * text
    starts = F.pad((before + 1 + frames + behind).cumsum(0), (1, 0))
    mode = starts[:-1] + before
    num_frames, num_samples = batch.frame_index.numel(), batch.num_samples
    num_text = batch.input_ids.numel() - num_frames
    total = num_frames + 2 * num_samples + (0 if order == "no text" else num_text)
    total -= num_samples if order == "text first" else 0
    # where each token goes, by its rank among its sample's frames, or among its text
    frame_rank = is_frame.cumsum(0) - 1 - batch.cu_frames[row]
    text_rank = (~is_frame).cumsum(0) - 1 - F.pad(text.cumsum(0), (1, 0))[row]
    first = starts[:-1] if order == "text first" else mode + frames + 2
    place = torch.where(is_frame, (mode + 1)[row] + frame_rank, first[row] + text_rank)
    ids = batch.input_ids.new_zeros(total)
    if order != "no text":
        ids = ids.index_put((place,), batch.input_ids.masked_fill(is_frame, 0))
    flat = torch.arange(total, device=ids.device)
    own = torch.searchsorted(starts[1:-1], flat, right=True)
    scored = order == "frames first"
    laid = dataclasses.replace(
        batch,
        input_ids=ids,
        labels=ids,
        position_ids=flat - starts[own],
        cu_seqlens=starts,
        frame_index=place[batch.frame_index],
        target_index=place[batch.target_index + 1] - 1 if scored else batch.target_index[:0],
        targets=batch.targets if scored else batch.targets[:0],
        max_seqlen=batch.max_seqlen + MARKERS,  # at most: only the device knows what it really is
        max_prefix=batch.max_seqlen + MARKERS,
    )
    none = mode[:0]
    return Layout(
        laid,
        mode_index=mode,
        end_index=mode + frames + 1 if scored else none,
        no_text_index=starts[:-1] if order == "no text" else none,
    )
