"""The micro-batch: where data and models meet, and all that either knows of the other.

Legend: S samples, F frames, P tokens per frame, N tokens of all samples one after another.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, flat: samples lie one after another without padding.

    A text-only micro-batch carries one blank frame that no sample owns, so that every rank makes
    the same vision call; ``frame_index`` is then empty.
    """

    #: (F, 3, H, W) uint8, frames of all samples in order; F >= 1
    frames: Tensor
    #: (S+1,) int64, sample s owns frames [cu_frames[s], cu_frames[s+1])
    cu_frames: Tensor
    #: (N,) int64, each frame owns P placeholder ids
    input_ids: Tensor
    #: (N,) int64, the id itself where it is learned, else -100; not shifted
    labels: Tensor
    #: (N,) int64, counts from 0 in every sample
    position_ids: Tensor
    #: (S+1,) int64, sample s owns tokens [cu_seqlens[s], cu_seqlens[s+1])
    cu_seqlens: Tensor
    #: (cu_frames[-1] * P,) int64, where in input_ids the placeholders lie, frame by frame
    frame_index: Tensor
    #: S names, so that any error can say which samples it met
    keys: list[str]
    #: "text", "image" or "video"
    kind: str

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_frames(self) -> int:
        """Frames that a sample owns: 0 for a text-only micro-batch."""
        return int(self.cu_frames[-1])

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are learned. A sample's first token has no predecessor to predict it."""
        return int((shift_labels(self.labels, self.cu_seqlens) != IGNORE_INDEX).sum())

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def shift_labels(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What each position must predict: the next label of the same sample.

    Args:
        labels: (N,) unshifted.
        cu_seqlens: (S+1,).

    Returns:
        (N,) with -100 at the last token of every sample.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:-1] = labels[1:]
    shifted[cu_seqlens[1:] - 1] = IGNORE_INDEX
    return shifted
