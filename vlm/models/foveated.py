"""The foveated family: one token per video frame, and the language model chooses where to look.

1. The vision tower runs once over all frames and leaves each layer's keys and values.
2. Coarse pass: one static query looks at every frame; the language model reads those tokens.
3. Its hidden state after frame t-1 becomes the query for frame t (``q_init`` for the first).
4. Fine pass: the frames are looked at again with these queries; the text is predicted.

In the autoregressive mode 2 and 4 are one: the queries come from the fine stream itself, frame
after frame, with a key-value cache, as at inference.

Legend: N tokens, F frames, S samples, L longest sample, H language width, Q query width.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlm.batch import Batch
from vlm.models import generate, looks
from vlm.models.family import FamilyConfig, Output, Prefill, random_lm, random_tower
from vlm.models.foveation import Foveation
from vlm.models.language import LanguageModel, coordinates, to_rows
from vlm.models.preference import objective
from vlm.models.splice import fill
from vlm.models.vision import QUERYABLE, LayerCache, VisionEncoder

Mode = Literal["coarse_fine", "coarse_only", "autoregressive"]
MODES: tuple[Mode, ...] = ("coarse_fine", "coarse_only", "autoregressive")


#: passes whose losses are reported; those between the first and the last fine one are not
REPORTED = ("fine", "fine_first", "coarse")


class FoveatedConfig(FamilyConfig):
    model_type = "saccade_foveated"


class Pass(NamedTuple):
    """What one pass of the language model leaves."""

    #: (F, H) at the frames, from which the next pass' queries come
    asking: Tensor
    #: (N, H), or None if the pass stopped after the last frame
    hidden: Tensor | None


class FoveatedModel(PreTrainedModel):
    """Vision tower, foveation and language model, and how they meet."""

    config_class = FoveatedConfig
    towers = QUERYABLE
    new_weights: tuple[str, ...] = ()
    connector_class: type[Foveation] = Foveation
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    modes: tuple[Mode, ...] = MODES
    train_modes: tuple[Mode, ...] = ("coarse_fine", "coarse_only")
    passes: dict[str, tuple[str, ...]] = {
        "coarse_fine": ("fine", "coarse"),
        "coarse_only": ("coarse",),
    }
    generate = generate.generate

    def __init__(
        self, config: FoveatedConfig, tower: nn.Module | None = None, lm: nn.Module | None = None
    ) -> None:
        """``tower`` and ``lm`` are taken as they are; without them both start at random."""
        super().__init__(config)
        tower = tower or random_tower(config)
        lm = lm or random_lm(config)
        connector = dict(config.connector)
        self.coarse_weight = connector.pop("coarse_weight")
        # models that were exported before there were these
        passes, loss = connector.pop("fine_passes", 1), connector.pop("fine_loss", "final")
        self.fine_weights = pass_weights(passes, loss)
        ways = {name: connector.pop(name, False) for name in ("shallow", "sees_itself")}
        self.vision = VisionEncoder(tower, **ways)
        self.language = LanguageModel(lm)
        self.connector = self.connector_class(
            vision_dim=self.vision.dim, language_dim=self.language.dim, **connector
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts are initialised by their own classes, the connector by its constructor."""

    def forward(
        self, batch: Batch, mode: Mode = "coarse_fine", measure_all: bool = False
    ) -> Output:
        """Losses of one micro-batch: "fine" (the last fine pass), "fine_first", "coarse".

        Args:
            mode: ``autoregressive`` has no gradient.
            measure_all: also measure the losses without a weight, and how frames were looked at,
                which costs no gradient.
        """
        if mode == "autoregressive":
            losses = self.language.token_losses(self.autoregressive_hidden(batch), batch)
            total, measured = objective(losses, batch)
            return Output(total, {"fine": total, **measured}, losses)
        _, cache = self.vision(batch.frames)
        text = self.language.embed(batch.input_ids)
        queries = self.static_queries(batch)
        tokens = self.connector(self.vision, cache, queries)
        glance = (queries, tokens)
        if mode == "coarse_only":
            return self._coarse_only(batch, cache, text, glance, measure_all)
        # what pairs are compared with is known of the last fine pass alone
        score_all = measure_all and batch.reference is None
        names = self.pass_names
        weights = dict(zip(names, (self.coarse_weight, *self.fine_weights), strict=True))
        hidden_of: dict[str, Tensor | None] = {}
        asking: Tensor | None = None
        for name, weight in weights.items():
            if asking is not None:
                queries = self.next_queries(batch, asking)
                tokens = self.connector(self.vision, cache, queries)
            asking, hidden_of[name] = self._read(text, tokens, batch, weight, score_all)
        seen = {"coarse": glance, "fine": (queries, tokens)}
        found = self.looked(batch, cache, text, seen) if measure_all else ({}, {})
        losses_of = {
            name: self._score(hidden, batch, weights[name])
            for name, hidden in reversed(hidden_of.items())
            if hidden is not None
        }
        if batch.reference is not None:
            total, measured = objective(losses_of["fine"], batch)
            parts = {"fine": total, **measured}
            return Output(total, parts, losses_of["fine"].detach(), *found)
        parts = {name: losses.sum() for name, losses in losses_of.items()}
        loss = sum(weights[name] * part for name, part in parts.items() if weights[name] > 0)
        reported = {name: part for name, part in parts.items() if name in REPORTED}
        return Output(loss, reported, losses_of["fine"].detach(), *found)

    def _coarse_only(
        self,
        batch: Batch,
        cache: list[LayerCache],
        text: Tensor,
        glance: tuple[Tensor, Tensor],
        measure_all: bool,
    ) -> Output:
        hidden = self.language(fill(text, batch.frame_index, glance[1]), batch)
        losses = self.language.token_losses(hidden, batch)
        # a parameter without a gradient keeps that of the step before under ZeRO-3
        asked = self.next_queries(batch, at_frames(hidden, batch))
        coarse, measured = objective(losses, batch)
        coarse = coarse + 0.0 * asked.sum().to(losses.dtype)
        found = self.looked(batch, cache, text, {"coarse": glance}) if measure_all else ({}, {})
        return Output(coarse, {"coarse": coarse, **measured}, losses.detach(), *found)

    @torch.no_grad()
    def looked(
        self,
        batch: Batch,
        cache: list[LayerCache],
        text: Tensor,
        passes: Mapping[str, tuple[Tensor, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What passes were like: measures and maps, as ``Output`` has them.

        Random numbers of training stay as they are.

        Args:
            text: (N, H) embeddings of ``batch.input_ids``.
            passes: "coarse", "fine" -> queries (F, Q) and tokens (F, H).
        """
        with torch.random.fork_rng([text.device] if text.is_cuda else []):
            seen = {
                name: looks.Looks(
                    *one, self.vision.attention(self.connector.query_input_proj(one[0]), cache)
                )
                for name, one in passes.items()
            }
        is_text = torch.ones(len(text), dtype=torch.bool, device=text.device)
        is_text[batch.frame_index] = False
        owned = torch.full((len(batch.frames),), batch.has_frames, device=text.device)
        follows, grid = owned & ~first_frames(batch), self.vision.grid(batch.frames)
        measures = looks.measure(seen, text, is_text, follows, owned)
        maps = {name: looks.over_patches(one.attention, grid) for name, one in seen.items()}
        return measures, maps

    @property
    def pass_names(self) -> list[str]:
        """Of all passes in order: coarse, then the fine ones, the last of which is "fine"."""
        between = [f"fine_{i}" for i in range(2, len(self.fine_weights))]
        first = ["fine_first"] if len(self.fine_weights) > 1 else []
        return ["coarse", *first, *between, "fine"]

    def _read(
        self, text: Tensor, tokens: Tensor, batch: Batch, weight: float, measure: bool
    ) -> Pass:
        """One pass of the language model over visual tokens (F, H); text only where it is scored.

        What is only measured gets a pass of its own, which keeps nothing for a backward pass and
        leaves the random numbers of training as they are.
        """
        embeds = fill(text, batch.frame_index, tokens)
        if weight > 0 or (measure and not torch.is_grad_enabled()):
            hidden = self.language(embeds, batch)
            return Pass(at_frames(hidden, batch), hidden)
        asking = self.language(embeds, batch, prefix_only=True)
        if not measure:
            return Pass(asking, None)
        devices = [embeds.device] if embeds.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            return Pass(asking, self.language(embeds, batch))

    def _score(self, hidden: Tensor, batch: Batch, weight: float) -> Tensor:
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            return self.language.token_losses(hidden, batch)

    @torch.no_grad()
    def losses_by_mode(self, batch: Batch) -> dict[str, Tensor]:
        """Loss sums; one call gives two, the coarse pass of coarse_fine is coarse_only."""
        parts = self(batch, mode="coarse_fine", measure_all=True).parts
        return {
            "coarse_only": parts["coarse"],
            "coarse_fine": parts["fine"],
            "autoregressive": self(batch, mode="autoregressive").parts["fine"],
        }

    def prefill(self, batch: Batch, mode: Mode) -> Prefill:
        if mode == "autoregressive":
            hidden, kv, _ = self.autoregressive_rows(batch)
            return Prefill(hidden, kv, batch.cu_seqlens.diff())
        _, cache = self.vision(batch.frames)
        coarse = mode == "coarse_only"
        queries = self.static_queries(batch) if coarse else self.last_queries(batch, cache)
        tokens = self.connector(self.vision, cache, queries)
        embeds = fill(self.language.embed(batch.input_ids), batch.frame_index, tokens)
        return self.language.prefill(embeds, batch)

    def static_queries(self, batch: Batch) -> Tensor:
        """(F, Q): with what the coarse pass looks at every frame."""
        return self.connector.q_static(len(batch.frames))

    def next_queries(self, batch: Batch, asking: Tensor) -> Tensor:
        """(F, H) hidden states of the pass before -> (F, Q) queries of this one."""
        return self.connector.next_queries(asking, first_frames(batch))

    def last_queries(self, batch: Batch, cache: list[LayerCache]) -> Tensor:
        """(F, Q): with what the last fine pass looks at every frame."""
        text, queries = self.language.embed(batch.input_ids), self.static_queries(batch)
        for _ in self.fine_weights:
            tokens = self.connector(self.vision, cache, queries)
            embeds = fill(text, batch.frame_index, tokens)
            queries = self.next_queries(batch, self.language(embeds, batch, prefix_only=True))
        return queries

    @torch.no_grad()
    def autoregressive_hidden(self, batch: Batch, text: Tensor | None = None) -> Tensor:
        """(N, H) hidden states with queries from the fine stream itself."""
        rows, _, _ = self.autoregressive_rows(batch, text)
        return rows[coordinates(batch)]

    @torch.no_grad()
    def autoregressive_rows(
        self, batch: Batch, text: Tensor | None = None
    ) -> tuple[Tensor, Any, Tensor]:
        """Reads every sample position by position up to its last frame, the rest at once.

        Args:
            text: (N, H) what stands where no frame does; None: embeddings of the ids.

        Returns:
            (S, L, H) hidden states, the key-value cache behind them, and the (F, Q) queries used.
        """
        _, kv = self.vision(batch.frames)
        text = self.language.embed(batch.input_ids) if text is None else text
        rows = to_rows(text, batch)
        frame_at, queries = self._frame_table(batch), self.connector.q_init(len(batch.frames))
        queries, cache, hidden = queries.clone(), DynamicCache(), []
        last = batch.position_ids[batch.frame_index].max() + 1 if batch.has_frames else 0
        for column in range(int(last)):
            frame = frame_at[:, column]
            row = (frame >= 0).nonzero().flatten()
            frame = frame[row]
            step = rows[:, column].clone()
            if len(frame):
                one = [layer.of_frames(frame) for layer in kv]
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


def pass_weights(num_passes: int, loss: Literal["final", "mean", "progressive"]) -> list[float]:
    """What each fine pass counts for, in order; the weights sum to 1."""
    each = {
        "final": [0.0] * (num_passes - 1) + [1.0],
        "mean": [1.0] * num_passes,
        "progressive": [float(i) for i in range(1, num_passes + 1)],
    }[loss]
    return [weight / sum(each) for weight in each]


def at_frames(hidden: Tensor, batch: Batch) -> Tensor:
    """(N, H) -> (F, H); the first token stands in for a frame that nobody owns."""
    return hidden[batch.frame_index] if batch.has_frames else hidden[:1]
