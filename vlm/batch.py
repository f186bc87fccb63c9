"""The micro-batch: where data and models meet, and all that either knows of the other.

Legend: S samples, F frames, P tokens per frame, N tokens of all samples one after another,
T tokens that are learned.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import DataError

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
    #: (N,) int64, counts from 0 in every sample; with cu_seqlens, a token's row and column
    position_ids: Tensor
    #: (S+1,) int64, sample s owns tokens [cu_seqlens[s], cu_seqlens[s+1])
    cu_seqlens: Tensor
    #: (cu_frames[-1] * P,) int64, where in input_ids the placeholders lie, frame by frame
    frame_index: Tensor
    #: (T,) int64, positions whose next token is learned
    target_index: Tensor
    #: (T,) int64, the tokens they must predict
    targets: Tensor
    #: (S,) int64, what losses are told apart by; the loader says what it means
    groups: Tensor
    #: tokens of the longest sample
    max_seqlen: int
    #: tokens of the longest sample up to its last frame; at least 1
    max_prefix: int
    #: (P,) of pairs of answers: which row of the loader's each is; samples 2p and 2p+1 are its
    #: chosen and its rejected branch
    pair_rows: Tensor | None = None
    #: (P, 2) log-probabilities of both answers before training, whose gain is learned; with it
    #: the loss of a batch is that of its pairs
    reference: Tensor | None = None
    #: how much a gain counts
    dpo_beta: float = 0.1
    #: (F, C, h, w) what an autoencoder makes of the frames; None where samples bring none
    latents: Tensor | None = None
    #: S names, so that any error can say which samples it met
    keys: list[str]
    #: "text", "image" or "video"
    kind: str

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_loss_tokens(self) -> int:
        return self.targets.numel()

    @property
    def num_losses(self) -> int:
        """What a sum of losses is divided by: learned tokens, or pairs."""
        return self.num_loss_tokens if self.reference is None else len(self.reference)

    @property
    def has_frames(self) -> bool:
        return self.frame_index.numel() > 0

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from where ``to`` copies without anybody waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            f.name: change(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


def build_batch(
    *,
    frames: Tensor,
    frame_counts: Sequence[int],
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    image_token_id: int,
    tokens_per_frame: int,
    keys: list[str],
    kind: str,
    groups: Sequence[int] | None = None,
) -> Batch:
    """Flattens samples and finds, on the CPU, every index the model will need on the device.

    Args:
        frames: (F, 3, H, W) uint8, all frames in order; one blank frame if there is none.
        frame_counts: frames of each sample.
        input_ids: token ids of each sample, placeholders included.
        labels: the same shape, -100 where nothing is learned.
        groups: of each sample; None: all of one.

    Raises:
        DataError: a sample's placeholders and frames do not match.
    """
    for key, ids, count in zip(keys, input_ids, frame_counts, strict=True):
        found = ids.count(image_token_id)
        if found != count * tokens_per_frame:
            raise DataError(
                f"sample {key}: found {found} placeholder tokens for {count} frames, expected "
                f"{count * tokens_per_frame}; the text must hold {tokens_per_frame} for each frame"
            )
    assert len(frames) == max(1, sum(frame_counts)), (frames.shape, frame_counts)
    lengths = torch.tensor([len(ids) for ids in input_ids])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    flat_ids = torch.tensor([i for ids in input_ids for i in ids])
    flat_labels = torch.tensor([i for row in labels for i in row])
    position_ids = torch.arange(len(flat_ids)) - cu_seqlens[:-1].repeat_interleave(lengths)
    frame_index = (flat_ids == image_token_id).nonzero().flatten()
    shifted = shift_labels(flat_labels, cu_seqlens)
    target_index = (shifted != IGNORE_INDEX).nonzero().flatten()
    prefix = position_ids[frame_index].max().item() + 1 if len(frame_index) else 1
    return Batch(
        frames=frames,
        cu_frames=F.pad(torch.tensor(frame_counts).cumsum(0), (1, 0)),
        input_ids=flat_ids,
        labels=flat_labels,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        frame_index=frame_index,
        target_index=target_index,
        targets=shifted[target_index],
        groups=torch.tensor([0] * len(keys) if groups is None else groups),
        max_seqlen=int(lengths.max()),
        max_prefix=int(prefix),
        keys=keys,
        kind=kind,
    )


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
