"""The cross-attention family: a decoder that looks at a tower's tokens in every layer.

The legacy image captioner (ViT and DistilGPT2) that prefixes are judged against: an image has no
place in the text, all its tokens are keys of a second attention in each block of the language
model. transformers' ``VisionEncoderDecoderModel``, in the interface of the other families.

Legend: S samples, F frames, P tokens of a frame, C context of a sample (its frames' tokens), L
longest sample, N tokens, H language width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from vlm.batch import Batch
from vlm.models.family import FamilyConfig, Prefill
from vlm.models.language import LanguageModel, coordinates, to_rows
from vlm.models.one_pass import Mode, Projected


class CrossAttentionConfig(FamilyConfig):
    model_type = "saccade_cross_attention"


class Context(NamedTuple):
    #: (S, C, H)
    tokens: Tensor
    #: (S, C), False where a sample has fewer frames than others
    mask: Tensor


class ContextCache(DynamicCache):
    """Keys and values of the text, and what is looked at beside it."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.context = Context(*(t.repeat_interleave(repeats, 0) for t in self.context))

    # beams of a sample share its context: ``reorder_cache`` has nothing to do for it


class LookingLanguageModel(LanguageModel):
    """A language model whose blocks look at a context."""

    @property
    def is_flat(self) -> bool:
        """Rows whatever the attention, each beside its context."""
        return False

    def read(self, rows: Tensor, context: Context, **options: Any) -> Tensor:
        """(S, L, H) -> (S, L, H)."""
        return self.lm.get_decoder()(
            inputs_embeds=rows,
            encoder_hidden_states=context.tokens.to(rows.dtype),
            encoder_attention_mask=context.mask,
            **options,
        ).last_hidden_state

    def run_rows(
        self,
        rows: Tensor,
        cache: Cache,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(cache, ContextCache), type(cache)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.read(rows, cache.context, use_cache=True, **options)


class CrossAttentionModel(Projected):
    """Vision tower, a map to the language model's width if it differs, and a decoder that looks."""

    config_class = CrossAttentionConfig
    language: LookingLanguageModel
    new_weights = ("crossattention", "ln_cross_attn")

    def __init__(
        self,
        config: CrossAttentionConfig,
        tower: nn.Module | None = None,
        lm: nn.Module | None = None,
    ) -> None:
        """``tower`` and ``lm`` are taken as they are; without them both start at random."""
        super().__init__(config, tower, lm)
        self.language = LookingLanguageModel(self.language.lm)

    def make_connector(self, keys: dict[str, Any]) -> nn.Module:
        """(F, P, D) -> (F, P, H)."""
        if self.vision.dim == self.language.dim:
            return nn.Identity()
        return nn.Linear(self.vision.dim, self.language.dim)

    def context(self, batch: Batch) -> Context:
        """What each sample looks at; one without frames at nothing but zeros."""
        tokens = self.connector(self.vision(batch.frames))  # (F, P, H)
        counts, last = batch.cu_frames.diff(), batch.num_samples - 1
        frames = torch.arange(len(tokens), device=counts.device)
        owner = torch.searchsorted(batch.cu_frames[1:], frames, right=True).clamp(max=last)
        # each rank must give a gradient to the same parameters: a blank frame counts, times zero
        tokens = tokens * (frames < batch.cu_frames[-1])[:, None, None]
        rows = tokens.new_zeros(batch.num_samples, batch.max_frames, *tokens.shape[1:])
        rows = rows.index_put((owner, frames - batch.cu_frames[owner]), tokens)
        places = torch.arange(batch.max_frames, device=counts.device)
        seen = places < counts.clamp(min=1)[:, None]
        return Context(rows.flatten(1, 2), seen.repeat_interleave(tokens.shape[1], 1))

    def hidden(self, batch: Batch) -> Tensor:
        rows = to_rows(self.language.embed(batch.input_ids), batch)
        return self.language.read(rows, self.context(batch), use_cache=False)[coordinates(batch)]

    def prefill(self, batch: Batch, mode: Mode) -> Prefill:
        cache = ContextCache(self.context(batch))
        rows = to_rows(self.language.embed(batch.input_ids), batch)
        hidden = self.language.run_rows(rows, cache)
        return Prefill(hidden, cache, batch.cu_seqlens.diff())
