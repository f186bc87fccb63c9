"""The prefix family: an image's tokens, projected one by one, stand before its caption.

A frozen tower, a projection and a language model with adapters; nothing but the projection lies
between them, so a sample costs as many tokens as its image has patches.

Legend: F frames, P tokens of a frame, D vision width, H language width.
"""

from typing import Any

from torch import nn

from vlm.models.family import FamilyConfig
from vlm.models.one_pass import Projected
from vlm.models.perceiver import check_tokens


class PrefixConfig(FamilyConfig):
    model_type = "saccade_prefix"


class PrefixModel(Projected):
    """Vision tower, linear map or MLP, language model."""

    config_class = PrefixConfig

    def make_connector(self, keys: dict[str, Any]) -> nn.Module:
        """(F, P, D) -> (F, P, H)."""
        check_tokens(keys["tokens_per_frame"], self.vision.num_tokens, pooled=False)
        if keys["kind"] == "linear":
            return nn.Linear(self.vision.dim, self.language.dim)
        return nn.Sequential(
            nn.Linear(self.vision.dim, keys["hidden_dim"]),
            nn.GELU(),
            nn.Dropout(keys["dropout"]),
            nn.Linear(keys["hidden_dim"], self.language.dim),
        )
