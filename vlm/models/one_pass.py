"""A language model that reads every sample once: what families have in common that never look back.

Not here: what it reads, which each family says in ``embed``.

Legend: N tokens, F frames, K visual tokens, S samples, H language width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.batch import Batch
from vlm.models import generate
from vlm.models.family import FamilyConfig, Output, Prefill, random_lm, random_tower
from vlm.models.language import LanguageModel
from vlm.models.preference import objective
from vlm.models.splice import fill
from vlm.models.tower import TOWERS, Tower

Mode = Literal["one_pass"]


class OnePass(PreTrainedModel):
    """A language model that reads every sample once; ``embed`` says what it reads."""

    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    modes: tuple[Mode, ...] = ("one_pass",)
    train_modes: tuple[Mode, ...] = ("one_pass",)
    passes: dict[str, tuple[str, ...]] = {"one_pass": ()}
    generate = generate.generate
    #: parts of the names of weights that a pretrained language model may lack
    new_weights: tuple[str, ...] = ()
    language: LanguageModel

    def _init_weights(self, module: nn.Module) -> None:
        """The parts are initialised by their own classes."""

    def embed(self, batch: Batch) -> Tensor:
        """(N, H)."""
        raise NotImplementedError

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H) states of the language model behind every token."""
        return self.language(self.embed(batch), batch)

    def forward(self, batch: Batch, mode: Mode = "one_pass", measure_all: bool = False) -> Output:
        """The loss of one micro-batch; there is no other mode, and nothing else to measure."""
        losses = self.language.token_losses(self.hidden(batch), batch)
        return Output(*objective(losses, batch), losses.detach())

    @torch.no_grad()
    def losses_by_mode(self, batch: Batch) -> dict[str, Tensor]:
        return {"one_pass": self(batch).loss_sum}

    def prefill(self, batch: Batch, mode: Mode) -> Prefill:
        return self.language.prefill(self.embed(batch), batch)


class Projected(OnePass):
    """Vision tower, a connector that turns its tokens into visual tokens, and language model.

    1. The tower reads every frame once.
    2. The connector makes ``tokens_per_frame`` visual tokens of each.
    3. They stand where the frame's placeholders stood, and the language model reads on.
    """

    towers = tuple(TOWERS)

    def __init__(
        self, config: FamilyConfig, tower: nn.Module | None = None, lm: nn.Module | None = None
    ) -> None:
        """``tower`` and ``lm`` are taken as they are; without them both start at random."""
        super().__init__(config)
        connector = dict(config.connector)
        self.vision = Tower(tower or random_tower(config), connector.pop("reads"))
        self.language = LanguageModel(lm or random_lm(config))
        self.connector = self.make_connector(connector)
        self.post_init()

    def make_connector(self, keys: dict[str, Any]) -> nn.Module:
        """(F, P, D) tokens of frames -> (F, tokens_per_frame, H).

        Args:
            keys: of the recipe's ``model.connector``, but ``reads``.

        Raises:
            ConfigError: they do not fit the tower.
        """
        raise NotImplementedError

    def embed(self, batch: Batch) -> Tensor:
        tokens = self.connector(self.vision(batch.frames)).flatten(0, 1)
        return fill(self.language.embed(batch.input_ids), batch.frame_index, tokens)
