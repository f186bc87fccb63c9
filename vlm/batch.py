"""The micro-batch: where data and models meet, and all that either knows of the other.

Legend: S samples, F frames, P tokens per frame, N tokens of all samples one after another,
T tokens that are learned.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    #: frames of the sample with most; at least 1
    max_frames: int
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
    latents: Tensor | None = None,
) -> Batch:
    """Flattens samples and finds, on the CPU, every index the model will need on the device.

    Args:
        frames: (F, 3, H, W) uint8, all frames in order; one blank frame if there is none.
        frame_counts: frames of each sample.
        input_ids: token ids of each sample, placeholders included.
        labels: the same shape, -100 where nothing is learned.
        latents: (F, C, h, w), as many as frames.
        groups: of each sample; None: all of one.

    Raises:
        DataError: a sample's placeholders and frames do not match.
    """
    # numpy: of tensors this small, torch takes several times as long
    lengths = [len(ids) for ids in input_ids]
    cu_seqlens, cu_frames = _running_sum(lengths), _running_sum(frame_counts)
    flat_ids, flat_labels = _flatten(input_ids, cu_seqlens[-1]), _flatten(labels, cu_seqlens[-1])
    is_frame = flat_ids == image_token_id
    placeholders = np.diff(_running_sum(is_frame)[cu_seqlens])
    for key, found, count in zip(keys, placeholders.tolist(), frame_counts, strict=True):
        if found != count * tokens_per_frame:
            raise DataError(
                f"sample {key}: found {found} placeholder tokens for {count} frames, expected "
                f"{count * tokens_per_frame}; the text must hold {tokens_per_frame} for each frame"
            )
    assert len(frames) == max(1, cu_frames[-1]), (frames.shape, frame_counts)
    position_ids = np.arange(len(flat_ids)) - cu_seqlens[:-1].repeat(lengths)
    frame_index = is_frame.nonzero()[0]
    shifted = shift_labels(flat_labels, cu_seqlens)
    target_index = (shifted != IGNORE_INDEX).nonzero()[0]
    return Batch(
        frames=frames,
        cu_frames=torch.from_numpy(cu_frames),
        input_ids=torch.from_numpy(flat_ids),
        labels=torch.from_numpy(flat_labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        frame_index=torch.from_numpy(frame_index),
        target_index=torch.from_numpy(target_index),
        targets=torch.from_numpy(shifted[target_index]),
        groups=torch.tensor([0] * len(keys) if groups is None else groups),
        max_seqlen=max(lengths),
        max_prefix=int(position_ids[frame_index].max()) + 1 if len(frame_index) else 1,
        max_frames=max(1, *frame_counts),
        keys=keys,
        kind=kind,
        latents=latents,
    )


def shift_labels(labels: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """What each position must predict: the next label of the same sample.

    Args:
        labels: (N,) unshifted.
        cu_seqlens: (S+1,).

    Returns:
        (N,) with -100 at the last token of every sample.
    """
    shifted = np.full_like(labels, IGNORE_INDEX)
    shifted[:-1] = labels[1:]
    shifted[cu_seqlens[1:] - 1] = IGNORE_INDEX
    return shifted


def _running_sum(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n+1,) int64: 0, and the sum up to each value."""
    found = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=found[1:])
    return found


def _flatten(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, length)
