"""The baselines that foveation is judged against, on the same data and schedule.

``multi_token`` gives every frame a fixed grid of tokens, read once; ``blind`` reads the text alone.
Nothing here chooses where to look.

Legend: N tokens, F frames, S samples, L longest sample, H language width.
"""

from torch import Tensor, nn

from vlm.batch import Batch
from vlm.models.family import FamilyConfig, random_lm, random_tower
from vlm.models.language import LanguageModel
from vlm.models.one_pass import OnePass
from vlm.models.pooling import Pooling
from vlm.models.splice import fill
from vlm.models.vision import QUERYABLE, VisionEncoder


class MultiTokenConfig(FamilyConfig):
    model_type = "saccade_multi_token"


class BlindConfig(FamilyConfig):
    model_type = "saccade_blind"


class MultiTokenModel(OnePass):
    """Vision tower, pooling and language model."""

    config_class = MultiTokenConfig
    towers = QUERYABLE

    def __init__(
        self, config: MultiTokenConfig, tower: nn.Module | None = None, lm: nn.Module | None = None
    ) -> None:
        """``tower`` and ``lm`` are taken as they are; without them both start at random."""
        super().__init__(config)
        self.vision = VisionEncoder(tower or random_tower(config))
        self.language = LanguageModel(lm or random_lm(config))
        self.connector = Pooling(
            vision_dim=self.vision.dim, language_dim=self.language.dim, **config.connector
        )
        self.post_init()

    def embed(self, batch: Batch) -> Tensor:
        tokens = self.connector(self.vision.patches(batch.frames))
        return fill(self.language.embed(batch.input_ids), batch.frame_index, tokens)


class BlindModel(OnePass):
    """The language model alone; frames have no place in the text."""

    config_class = BlindConfig

    def __init__(
        self, config: BlindConfig, tower: nn.Module | None = None, lm: nn.Module | None = None
    ) -> None:
        """``lm`` is taken as it is; without it, it starts at random. There is no tower."""
        assert tower is None, tower
        super().__init__(config)
        self.language = LanguageModel(lm or random_lm(config))
        self.post_init()

    def embed(self, batch: Batch) -> Tensor:
        assert not batch.has_frames, batch.keys
        return self.language.embed(batch.input_ids)
