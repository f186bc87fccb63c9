"""Any Hugging Face causal language model behind four methods: embed, run, score, step.

Samples come flat. Without varlen attention they are laid into rows, padded on the right: under a
causal mask no real token sees a pad, so rows need no attention mask, and pads leave no trace. With
flash attention they stay flat. ``tests/models/test_language.py`` holds the two equal.

Legend: N tokens, S samples, L longest sample, H width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.batch import Batch
from vlm.models.family import Prefill
from vlm.models.token_loss import token_losses


class LanguageModel(nn.Module):
    """Owns one causal LM (``lm``), its parameter names unchanged."""

    lm: Any

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        #: pieces that learned tokens are scored in; a constant of the run, because under ZeRO-3
        #: every call of the head is one that all ranks must make
        self.num_loss_chunks = 1

    @property
    def dim(self) -> int:
        return int(self.lm.config.hidden_size)

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Tied parameters, for a transformers model that holds this module as its child."""
        return {f"lm.{a}": f"lm.{b}" for a, b in self.lm.all_tied_weights_keys.items()}

    @property
    def is_flat(self) -> bool:
        """True if the attention takes samples of any length without rows."""
        return "flash" in self.lm.config._attn_implementation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        """Whoever casts the model casts its parameters only, as transformers does.

        The buffers are rotary frequencies: rounded to bfloat16, they are a radian off at position
        1000 (heads of 128), and not those that the exported model is loaded with.
        """
        buffers = [
            (m, name, old) for m in self.modules() for name, old in m.named_buffers("", False)
        ]
        super()._apply(fn, recurse)
        for module, name, old in buffers:
            new = module.get_buffer(name)
            if new.dtype != old.dtype:
                setattr(module, name, old.to(new.device))
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """(N,) -> (N, H)."""
        return self.lm.get_input_embeddings()(input_ids)

    def forward(self, embeds: Tensor, batch: Batch, prefix_only: bool = False) -> Tensor:
        """Runs the decoder over all samples, each by itself.

        Args:
            embeds: (N, H).
            prefix_only: stop after every sample's last frame; what comes later is not computed.

        Returns:
            (N, H) hidden states, or (K, H) at ``batch.frame_index`` if ``prefix_only``. If there
            is no frame, the first token stands in for one: every rank must go the same way.
        """
        if self.is_flat:
            return self._run_flat(embeds, batch, prefix_only)
        length = batch.max_prefix if prefix_only else batch.max_seqlen
        rows = to_rows(embeds, batch)[:, :length]
        hidden = self.lm.get_decoder()(
            inputs_embeds=rows, past_key_values=self._no_cache(), use_cache=False
        ).last_hidden_state
        row, column = coordinates(batch)
        if prefix_only:
            at = _frame_states(batch)
            row, column = row[at], column[at]
        return hidden[row, column]

    def _no_cache(self) -> Cache | None:
        # transformers drops a cache where it recomputes, with a warning; some models have their own
        recomputes = self.training and any(
            isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
            for layer in self.lm.modules()
        )
        return None if recomputes or self.lm._is_stateful else _NoCache()

    def _run_flat(self, embeds: Tensor, batch: Batch, prefix_only: bool) -> Tensor:
        # position ids that start anew mark the borders of samples for varlen kernels
        positions = batch.position_ids
        if prefix_only:
            kept = (positions < batch.max_prefix).nonzero().flatten()
            embeds, positions = embeds[kept], positions[kept]
        hidden = self.lm.get_decoder()(
            inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False
        ).last_hidden_state[0]
        if not prefix_only:
            return hidden
        return hidden[torch.searchsorted(kept, _frame_states(batch))]

    def token_losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(T,) cross entropies of all learned tokens, in float32.

        Args:
            hidden: (N, H); the state before a token predicts it, so the last frame predicts the
                first token of the text.
        """
        states = hidden[batch.target_index]
        return token_losses(
            self.lm.get_output_embeddings(), states, batch.targets, self.num_loss_chunks
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        return self.lm.get_output_embeddings()(hidden)

    def prefill(self, embeds: Tensor, batch: Batch) -> Prefill:
        """(N, H) embeddings of prompts, read with a cache."""
        cache = DynamicCache()
        hidden = self.run_rows(to_rows(embeds, batch), cache)
        return Prefill(hidden, cache, batch.cu_seqlens.diff())

    def run_rows(
        self,
        rows: Tensor,
        cache: Cache,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Continues rows behind a key-value cache, which grows by L entries.

        Args:
            rows: (S, L, H).
            mask: (S, cached + L), 0 where an entry is a pad; None if no pad lies behind any token.
            positions: (S, L); None counts on from the cache.

        Returns:
            (S, L, H).
        """
        return self.lm.get_decoder()(
            inputs_embeds=rows,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _NoCache(DynamicCache):
    """Keeps nothing. Without a cache transformers looks for several samples in a row, which makes
    the host wait for the device at every call."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _frame_states(batch: Batch) -> Tensor:
    """Where the hidden states of frames are; never empty."""
    return batch.frame_index if batch.has_frames else batch.cu_seqlens[:1]


def coordinates(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row (its sample) and column (its place in it) of each token: two (N,)."""
    starts = batch.cu_seqlens[1:-1]
    flat = torch.arange(batch.input_ids.numel(), device=starts.device)
    return torch.searchsorted(starts, flat, right=True), batch.position_ids


def to_rows(embeds: Tensor, batch: Batch) -> Tensor:
    """(N, H) -> (S, L, H), zeros on the right."""
    row, column = coordinates(batch)
    rows = embeds.new_zeros(batch.num_samples, batch.max_seqlen, embeds.shape[-1])
    return rows.index_put((row, column), embeds)
