"""Foveation: the connector through which a language model looks at frames, one token for each.

A query of ``query_dim`` enters the vision tower as an extra token, passes all its layers and comes
back as one token for the language model, whose hidden state makes the query for the next frame.

Legend: F frames, Q query width, D vision width, H language width.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.models.vision import LayerCache, VisionEncoder


class LearnedQuery(nn.Module):
    """One query vector. A module of its own so that ZeRO-3 gathers it when it is used."""

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, dim) * std)

    def forward(self, num_frames: int) -> Tensor:
        return self.weight.expand(num_frames, -1)


class Foveation(nn.Module):
    """Queries in, visual tokens out (B-release; names as in the published weights).

    ``q_static`` looks at all frames in the coarse pass, ``q_init`` at each sample's first frame in
    the fine pass.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        language_dim: int,
        query_dim: int,
        query_bias: bool,
        query_std: float,
        visual_scale: float,
    ) -> None:
        super().__init__()
        self.visual_scale = visual_scale
        self.gradient_checkpointing = False
        self.q_static = LearnedQuery(query_dim, query_std)
        self.q_init = LearnedQuery(query_dim, query_std)
        self.query_input_proj = nn.Linear(query_dim, vision_dim, bias=query_bias)
        self.output_proj = nn.Linear(vision_dim, vision_dim)
        self.dino_to_llm = nn.Linear(vision_dim, language_dim)
        self.llm_to_query = nn.Linear(language_dim, query_dim)

    def forward(self, vision: VisionEncoder, cache: list[LayerCache], queries: Tensor) -> Tensor:
        """(F, Q) queries -> (F, H) visual tokens."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._look, vision, cache, queries, use_reentrant=False)
        return self._look(vision, cache, queries)

    def _look(self, vision: VisionEncoder, cache: list[LayerCache], queries: Tensor) -> Tensor:
        looked = vision.look(self.query_input_proj(queries), cache)
        return self.visual_scale * self.dino_to_llm(self.output_proj(looked))

    def next_queries(self, hidden: Tensor, is_first: Tensor) -> Tensor:
        """The queries of the fine pass: frame t is looked at with what frame t-1 asked for.

        Args:
            hidden: (F, H) hidden states at the frames.
            is_first: (F,) True at each sample's first frame, which gets ``q_init``.

        Returns:
            (F, Q).
        """
        asked = self.llm_to_query(hidden).roll(1, dims=0)
        return torch.where(is_first[:, None], self.q_init(len(hidden)), asked)
