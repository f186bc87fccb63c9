"""From read samples to a batch: augmented frames, token ids with a place for each frame.

Not here: reading (``vlm.data.load.reader``), tokenizing (``vlm.data.text.encode``), threads
(``vlm.data.load.loader``).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vlm.batch import Batch, build_batch
from vlm.config import AugmentConfig
from vlm.data.format.schema import MARK, Sample, Turn
from vlm.data.load.augment import augment
from vlm.data.load.reader import LoadedSample
from vlm.data.plan import plan
from vlm.data.plan.catalog import Catalog
from vlm.data.text import chat
from vlm.data.text.encode import encode_branches, encode_sample
from vlm.errors import DataError, SampleError


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns samples into a batch."""

    tokenizer: PreTrainedTokenizerFast
    image_token: str
    tokens_per_frame: int
    loss_on: Literal["answers", "all", "preference"]
    augment: AugmentConfig
    seed: int
    #: where texts are cut; None: nowhere
    max_text_tokens: int | None = None
    #: (C, h, w) of the latents that samples bring; None where none are wanted
    latent_shape: tuple[int, int, int] | None = None

    @functools.cached_property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def encode(self, loaded: LoadedSample, question_first: bool = False) -> chat.Encoded:
        """``encode_sample`` of one that is read."""
        return self.encode_sample(loaded.sample, len(loaded.frames), question_first=question_first)

    def encode_sample(
        self, sample: Sample, num_frames: int, repeats: int = 1, question_first: bool = False
    ) -> chat.Encoded:
        """Token ids and labels, with placeholders.

        Args:
            num_frames: Frames of the sample.
            repeats: How often each frame is shown.
            question_first: Frames stand behind the first question, if the text does not say where.

        Raises:
            SampleError: without the sample's name.
        """
        (encoded,) = self.encode_branches(sample, num_frames, repeats, question_first)
        return encoded

    @property
    def branches(self) -> int:
        """Sequences that a sample becomes: two of a pair, its chosen and its rejected branch."""
        return 2 if self.loss_on == "preference" else 1

    def encode_branches(
        self, sample: Sample, num_frames: int, repeats: int = 1, question_first: bool = False
    ) -> list[chat.Encoded]:
        """``encode_sample`` of each of a sample's ``branches``; all show all its frames."""
        if question_first:
            sample = _question_first(sample, num_frames)
        if self.loss_on != "preference":
            found = [encode_sample(self.tokenizer, sample, self.image_token, self.loss_on)]
        elif sample.form == "preference":
            found = encode_branches(self.tokenizer, sample, self.image_token)
        else:
            raise SampleError("one conversation, expected a preference pair; leave its source out")
        found = [
            chat.truncate(self.tokenizer, one, self.max_text_tokens, self.image_token)
            for one in found
        ]
        per_frame = repeats * self.tokens_per_frame
        return [
            chat.expand_frames(one, num_frames, per_frame, self.image_token_id) for one in found
        ]

    def encode_prompt(
        self, turns: Sequence[Turn], kind: str, num_frames: int, ask_first: bool = False
    ) -> chat.Encoded:
        """A conversation that ends with the user's turn, for an answer to follow.

        Args:
            kind: Of the sample, video or image.
            ask_first: frames stand behind the first question, as ``question_first`` puts them.
        """
        if ask_first:
            turns = question_first(turns, kind, num_frames)
        prompt = chat.encode_prompt(self.tokenizer, turns, self.image_token)
        return chat.expand_frames(prompt, num_frames, self.tokens_per_frame, self.image_token_id)

    def augment_frames(self, frames: np.ndarray, row: int, epoch: int) -> None:
        """Changes (T, H, W, 3) uint8 in place, as drawn for (seed, epoch, row)."""
        if len(frames) and self.augment != AugmentConfig():
            rng = plan.sample_rng(self.seed, epoch, row)
            frames[...] = augment(frames, self.augment, rng)

    def batch(
        self,
        frames: list[np.ndarray],
        encoded: list[chat.Encoded],
        keys: list[str],
        kind: str,
        blank: tuple[int, int],
        latents: Sequence[np.ndarray | None] = (),
    ) -> Batch:
        """Joins samples of which each has its frames (T, H, W, 3) uint8 for itself.

        Args:
            blank: (H, W) of the frame that text-only batches carry.
            latents: of samples with frames, (T, C, h, w); none, or one for each of them.
        """
        known = [one for one in latents if one is not None]
        owned = [f for f in frames if len(f)] or [np.zeros((1, *blank, 3), np.uint8)]
        slab = torch.from_numpy(np.concatenate(owned))
        joined = torch.from_numpy(np.concatenate(known)) if known else None
        return self.join(slab, [len(f) for f in frames], encoded, keys, kind, latents=joined)

    def join(
        self,
        frames: torch.Tensor,
        frame_counts: Sequence[int],
        encoded: Sequence[chat.Encoded],
        keys: list[str],
        kind: str,
        groups: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
    ) -> Batch:
        """Joins samples whose frames lie in one piece of memory.

        Args:
            frames: (F, H, W, 3) uint8, all samples' in order; one blank frame where there is none.
            latents: (F, C, h, w), as many as frames.
        """
        return build_batch(
            frames=frames.permute(0, 3, 1, 2),
            frame_counts=frame_counts,
            input_ids=[e.input_ids for e in encoded],
            labels=[e.labels for e in encoded],
            image_token_id=self.image_token_id,
            tokens_per_frame=self.tokens_per_frame,
            keys=keys,
            kind=kind,
            groups=groups,
            latents=latents,
        )


def _question_first(sample: Sample, num_frames: int) -> Sample:
    """The sample with its frames behind its first question, if it is text without marks."""
    if sample.form not in ("turns", "caption"):
        return sample
    turns = question_first(sample.conversation(), sample.kind, num_frames)
    return sample.model_copy(update={"turns": turns, "caption": None})


def question_first(turns: Sequence[Turn], kind: str, num_frames: int) -> tuple[Turn, ...]:
    """The turns with a place for the frames behind the first question, if they have none yet.

    Args:
        kind: Of the sample, video or image.
    """
    asked = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if num_frames == 0 or any(MARK.search(turns[i].content) for i in asked):
        return tuple(turns)
    first = asked[0]
    # no space before it: the text must keep the number of tokens that the plan counted
    mark = "<video>" if kind == "video" else "<image>" * num_frames
    marked = turns[first].model_copy(update={"content": turns[first].content + mark})
    return (*turns[:first], marked, *turns[first + 1 :])


def frame_size(catalog: Catalog) -> tuple[int, int]:
    """(H, W) of the catalog's frames; 224 x 224 where it has none.

    Raises:
        DataError: they are not all of one size.
    """
    has_frames = catalog.num_frames > 0
    if not has_frames.any():
        return (224, 224)
    low, high = (
        (int(pick(catalog.height[has_frames])), int(pick(catalog.width[has_frames])))
        for pick in (np.min, np.max)
    )
    if low != high:
        raise DataError(
            f"{catalog.names()}: frames from {low[0]} x {low[1]} to {high[0]} x {high[1]} "
            "pixels, expected one size; build the manifests with one --size for all"
        )
    return high
