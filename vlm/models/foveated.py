"""The foveated family: one token per video frame, and the language model chooses where to look.

1. The vision tower runs once over all frames and leaves each layer's keys and values.
2. Coarse pass: one static query looks at every frame; the language model reads those tokens.
3. Its hidden state after frame t-1 becomes the query for frame t (``q_init`` for the first).
4. Fine pass: the frames are looked at again with these queries; the text is predicted.

In the autoregressive mode 2 and 4 are one: the queries come from the fine stream itself, frame
after frame, with a key-value cache, as at inference.

Legend: N tokens, F frames, S samples, L longest sample, H language width, Q query width.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlm.batch import Batch
from vlm.models.foveation import Foveation
from vlm.models.language import LanguageModel, coordinates, new_cache, to_rows
from vlm.models.splice import fill
from vlm.models.vision import KeyValue, VisionEncoder

Mode = Literal["coarse_only", "coarse_fine", "autoregressive"]
MODES: tuple[Mode, ...] = ("coarse_only", "coarse_fine", "autoregressive")


class Output(NamedTuple):
    """Sums over learned tokens, never means: who trains divides by the global count."""

    #: what is trained on; the fine loss plus coarse_weight times the coarse one
    loss_sum: Tensor
    #: by name: "fine", "coarse"
    parts: dict[str, Tensor]


class FoveatedConfig(PreTrainedConfig):
    model_type = "saccade_foveated"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        language_config: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config or {}
        self.language_config = language_config or {}
        self.connector = connector or {}
        super().__init__(**kwargs)


class FoveatedModel(PreTrainedModel):
    """Vision tower, foveation and language model, and how they meet."""

    config_class = FoveatedConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    tokens_per_frame = 1
    #: modes with a gradient
    train_modes: tuple[Mode, ...] = ("coarse_only", "coarse_fine")

    def __init__(
        self, config: FoveatedConfig, tower: nn.Module | None = None, lm: nn.Module | None = None
    ) -> None:
        """``tower`` and ``lm`` are taken as they are; without them both start at random."""
        super().__init__(config)
        tower = tower or AutoModel.from_config(_part(config.vision_config))
        lm = lm or AutoModelForCausalLM.from_config(_part(config.language_config))
        connector = dict(config.connector)
        self.coarse_weight = connector.pop("coarse_weight")
        self.vision = VisionEncoder(tower)
        self.language = LanguageModel(lm)
        self.connector = Foveation(
            vision_dim=self.vision.dim, language_dim=self.language.dim, **connector
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts are initialised by their own classes, the connector by its constructor."""

    def forward(
        self, batch: Batch, mode: Mode = "coarse_fine", with_coarse_loss: bool | None = None
    ) -> Output:
        """Losses of one micro-batch.

        Args:
            mode: ``autoregressive`` has no gradient.
            with_coarse_loss: also measure the coarse loss; default: if it has a weight.
        """
        if mode == "autoregressive":
            fine = self.language.loss_sum(self.autoregressive_hidden(batch), batch)
            return Output(fine, {"fine": fine})
        if with_coarse_loss is None:
            with_coarse_loss = self.coarse_weight > 0
        _, cache = self.vision(batch.frames)
        text = self.language.embed(batch.input_ids)
        tokens = self.coarse_tokens(batch, cache)
        if mode == "coarse_only":
            hidden = self.language(fill(text, batch.frame_index, tokens), batch)
            coarse = self.language.loss_sum(hidden, batch)
            # a parameter without a gradient keeps that of the step before under ZeRO-3
            asked = hidden[batch.frame_index] if batch.has_frames else hidden[:1]
            coarse = coarse + 0.0 * self.fine_queries(batch, asked).sum().float()
            return Output(coarse, {"coarse": coarse})
        prefix_only = not with_coarse_loss
        hidden = self.language(fill(text, batch.frame_index, tokens), batch, prefix_only)
        at_frames = hidden if prefix_only else hidden[batch.frame_index]
        tokens = self.fine_tokens(batch, cache, at_frames if batch.has_frames else hidden[:1])
        fine = self.language.loss_sum(
            self.language(fill(text, batch.frame_index, tokens), batch), batch
        )
        if prefix_only:
            return Output(fine, {"fine": fine})
        coarse = self.language.loss_sum(hidden, batch)
        return Output(fine + self.coarse_weight * coarse, {"fine": fine, "coarse": coarse})

    def coarse_tokens(self, batch: Batch, cache: list[KeyValue]) -> Tensor:
        """(F, H): every frame as the static query sees it."""
        queries = self.connector.q_static(len(batch.frames))
        return self.connector(self.vision, cache, queries)

    def fine_queries(self, batch: Batch, hidden: Tensor) -> Tensor:
        """(F, H) hidden states of the pass before -> (F, Q) queries of this one."""
        return self.connector.next_queries(hidden, first_frames(batch))

    def fine_tokens(self, batch: Batch, cache: list[KeyValue], hidden: Tensor) -> Tensor:
        """(F, H): every frame as its own query sees it."""
        return self.connector(self.vision, cache, self.fine_queries(batch, hidden))

    @torch.no_grad()
    def autoregressive_hidden(self, batch: Batch) -> Tensor:
        """(N, H) hidden states with queries from the fine stream itself."""
        rows, _, _ = self.autoregressive_rows(batch)
        return rows[coordinates(batch)]

    @torch.no_grad()
    def autoregressive_rows(self, batch: Batch) -> tuple[Tensor, Any, Tensor]:
        """Reads every sample position by position up to its last frame, the rest at once.

        Returns:
            (S, L, H) hidden states, the key-value cache behind them, and the (F, Q) queries used.
        """
        _, kv = self.vision(batch.frames)
        rows = to_rows(self.language.embed(batch.input_ids), batch)
        frame_at, queries = self._frame_table(batch), self.connector.q_init(len(batch.frames))
        queries, cache, hidden = queries.clone(), new_cache(), []
        for column in range(batch.max_prefix if batch.has_frames else 0):
            frame = frame_at[:, column]
            row = (frame >= 0).nonzero().flatten()
            frame = frame[row]
            one = [KeyValue(layer.key[frame], layer.value[frame]) for layer in kv]
            step = rows[:, column].clone()
            step[row] = self.connector(self.vision, one, queries[frame]).to(step.dtype)
            state = self.language.run_rows(step[:, None], cache)
            hidden.append(state)
            asked = self.connector.llm_to_query(state[row, 0])
            follows = self._follower(batch, frame)
            queries[frame[follows] + 1] = asked[follows]
        if len(hidden) < batch.max_seqlen:
            hidden.append(self.language.run_rows(rows[:, len(hidden) :], cache))
        return torch.cat(hidden, dim=1), cache, queries

    def _frame_table(self, batch: Batch) -> Tensor:
        """(S, L): which frame stands at a row's column, -1 where none does."""
        row, column = coordinates(batch)
        table = torch.full((batch.num_samples, batch.max_seqlen), -1, device=row.device)
        index = batch.frame_index
        table[row[index], column[index]] = torch.arange(len(index), device=row.device)
        return table

    @staticmethod
    def _follower(batch: Batch, frame: Tensor) -> Tensor:
        """(K,) True where a frame has another one after it in the same sample."""
        return ~torch.isin(frame + 1, batch.cu_frames)


def first_frames(batch: Batch) -> Tensor:
    """(F,) True at each sample's first frame; a blank frame that nobody owns counts as one."""
    frames = torch.arange(len(batch.frames), device=batch.cu_frames.device)
    return torch.isin(frames, batch.cu_frames)


def _part(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
