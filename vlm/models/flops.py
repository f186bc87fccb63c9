"""Floating-point operations of a micro-batch, from its shapes alone: for MFU, HFU and estimates.

A counter reads a model's sizes and what of it trains once, then counts any micro-batch in any
forward mode: the patch stream, the deep queries of each pass, the connector, the language model's
passes and its head. Two totals: ``model`` is what the mathematics needs for real tokens and frames
(MFU), ``hardware`` what is executed, with padding, blank frames and what gradient checkpointing
computes again (HFU). Nothing is run or timed here; what a count is made of is in
``vlm.models.flop_parts`` and ``vlm.models.flop_blocks``. ``COUNTERS`` holds the families that are
counted.

``tests/models/test_flops.py`` holds it to ``torch.utils.flop_counter``.

Legend: F frames.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.models.baselines import BlindModel, MultiTokenModel
from vlm.models.cross_attention import CrossAttentionModel
from vlm.models.flop_blocks import Context, Flops, Layer, attend, linear_map
from vlm.models.flop_frames import of_frame
from vlm.models.flop_parts import PatchFlops, TextFlops
from vlm.models.flop_work import Shapes, Work, executed, needed
from vlm.models.foveated import FoveatedModel, Mode
from vlm.models.one_pass import Projected
from vlm.models.perceiver import PerceiverModel
from vlm.models.prefix import PrefixModel


@dataclass
class MicroBatchFlops:
    #: what the mathematics needs for real tokens and frames
    model: float
    #: what is executed
    hardware: float
    #: ``hardware`` by part: vision, query, connector, language, head
    parts: dict[str, Flops]


PARTS = ("vision", "query", "connector", "language", "head")


class FlopCounter:
    """Of one foveated model as it trains now: make a new one when a component thaws.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: FoveatedModel) -> None:
        self._model, connector = model, model.connector
        self._patches, self._text = PatchFlops(model.vision), TextFlops(model.language)
        self._query_in = linear_map(connector.query_input_proj)
        self._query_out = linear_map(connector.output_proj)
        self._to_language = linear_map(connector.dino_to_llm)
        self._to_query = linear_map(connector.llm_to_query)
        self._learned = any(p.requires_grad for p in connector.q_static.parameters())

    def micro_batch(self, shapes: Shapes, mode: Mode = "coarse_fine") -> MicroBatchFlops:
        """Forward and backward; only forward in a mode that has no gradient."""
        parts = self._count(executed(shapes, self._model.language.is_flat), mode)
        return _totals(parts, self._count(needed(shapes), mode))

    def _count(self, work: Work, mode: Mode) -> dict[str, Flops]:
        parts = {name: Flops() for name in PARTS}
        trains = mode in self._model.train_modes
        lean = trains and self._model.vision.gradient_checkpointing
        self._patches.run(parts["vision"], work, lean, for_queries=True)
        if mode == "autoregressive":
            self._look(parts, work, self._learned, lean, first=True)
            self._to_query.run(parts["connector"], work.num_frames, False)
            self._text.read(parts["language"], work.stepped, False)
            self._text.score(parts["head"], work.num_loss_tokens, False)
        else:
            self._passes(parts, work, mode, lean)
        if not trains:
            parts = {name: Flops(flops.forward) for name, flops in parts.items()}
        return parts

    def _passes(self, parts: dict[str, Flops], work: Work, mode: Mode, lean: bool) -> None:
        """Looks and readings in turn; each look but the first asks from the reading before."""
        model, asked = self._model, False
        weights = (model.coarse_weight, *model.fine_weights)
        if mode == "coarse_only":
            weights = (1.0,)
        for index, weight in enumerate(weights):
            grad = asked or self._learned
            tokens = self._look(parts, work, grad, lean, first=index == 0)
            reach = work.full if weight > 0 else work.prefix
            hidden = self._text.read(parts["language"], reach, tokens)
            if weight > 0:
                self._text.score(parts["head"], work.num_loss_tokens, hidden)
            # the coarse mode asks, too, so that all parameters have a gradient
            if index + 1 < len(weights) or mode == "coarse_only":
                asked = self._to_query.run(parts["connector"], work.num_frames, hidden)

    def _look(
        self, parts: dict[str, Flops], work: Work, grad: bool, lean: bool, *, first: bool
    ) -> bool:
        """Queries through connector, tower and connector; True if tokens ask for a gradient."""
        own, query, num = Flops(), Flops(), work.num_frames
        grad = self._query_in.run(own, num, grad)
        grad = self._query(query, work, grad, lean, first)
        grad = self._query_out.run(own, num, grad)
        grad = self._to_language.run(own, num, grad)
        if self._model.connector.gradient_checkpointing and grad:
            # recomputing stops before the last map, whose result nobody keeps
            own.recompute += own.forward - self._to_language.forward(num)
            query.recompute += query.forward
            if lean:
                query.recompute += sum(
                    self._patches.offered(work, layer).forward for layer in self._looked_at
                )
        parts["connector"] += own
        parts["query"] += query
        return grad

    def _query(self, flops: Flops, work: Work, grad: bool, lean: bool, first: bool) -> bool:
        """One token per frame through the tower's layers; it attends, no patch attends to it."""
        vision, num = self._model.vision, work.num_frames
        pairs = num * (self._patches.frame_tokens(work)[0] + vision.sees_itself)
        for layer in self._looked_at:
            own, offered = Flops(), self._patches.offered(work, layer)
            query, key, value = layer.attention.inner
            normed = grad or layer.norms_train
            kept = offered.backward > 0
            asks = query.run(own, num, normed)
            if vision.sees_itself:
                key.run(own, num, normed)
                value.run(own, num, normed)
            keys = kept or (vision.sees_itself and normed)
            mixed = attend(own, pairs, layer.attention.outer.width, (asks, keys, keys))
            mixed = layer.attention.outer.run(own, num, mixed)
            grad = mixed if vision.shallow else layer.run_mlps(own, num, mixed or grad)
            if lean:  # keys and values are projected again for each look
                own.recompute += offered.forward
                if grad and not vision.shallow:
                    own.recompute += offered.forward + own.forward
                if not (first and layer is self._patches.layers[-1]):
                    own.recompute += offered.backward
            flops += own
        return grad

    @property
    def _looked_at(self) -> list[Layer]:
        layers = self._patches.layers
        return layers[-1:] if self._model.vision.shallow else layers


class OnePassCounter:
    """Of one model that reads every sample once, ``multi_token`` or ``blind``, as it trains now.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: MultiTokenModel | BlindModel) -> None:
        self._model, self._text = model, TextFlops(model.language)
        self._patches = PatchFlops(model.vision) if isinstance(model, MultiTokenModel) else None
        connector = model.connector.modules() if isinstance(model, MultiTokenModel) else ()
        self._maps = [linear_map(one) for one in connector if isinstance(one, nn.Linear)]

    def micro_batch(self, shapes: Shapes, mode: Any = "one_pass") -> MicroBatchFlops:
        """Forward and backward; there is one mode."""
        parts = self._count(executed(shapes, self._model.language.is_flat))
        return _totals(parts, self._count(needed(shapes)))

    def _count(self, work: Work) -> dict[str, Flops]:
        parts, grad = {name: Flops() for name in PARTS}, False
        if isinstance(self._model, MultiTokenModel) and self._patches is not None:
            lean = self._model.vision.gradient_checkpointing
            grad = self._patches.run(parts["vision"], work, lean, for_queries=False)
            for one in self._maps:
                tokens = work.num_frames * self._model.connector.side**2
                grad = one.run(parts["connector"], tokens, grad)
        hidden = self._text.read(parts["language"], work.full, grad)
        self._text.score(parts["head"], work.num_loss_tokens, hidden)
        return parts


class ProjectedCounter:
    """Of one model whose tower and connector read every frame once, as it trains now.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: Projected) -> None:
        self._model, self._text = model, TextFlops(model.language)

    def micro_batch(self, shapes: Shapes, mode: Any = "one_pass") -> MicroBatchFlops:
        """Forward and backward; there is one mode."""
        parts = self._count(executed(shapes, self._model.language.is_flat))
        return _totals(parts, self._count(needed(shapes)))

    def _count(self, work: Work) -> dict[str, Flops]:
        parts, frame = {name: Flops() for name in PARTS}, of_frame(self._model, work.frame_size)
        parts["vision"] = frame.vision.times(work.num_frames)
        parts["connector"] = frame.connector.times(work.num_frames)
        if isinstance(self._model, CrossAttentionModel):
            tokens, pairs = work.context
            context = Context(tokens * frame.num_tokens, pairs * frame.num_tokens, frame.grad)
            hidden = self._text.read(parts["language"], work.full, False, context)
        else:
            hidden = self._text.read(parts["language"], work.full, frame.grad)
        self._text.score(parts["head"], work.num_loss_tokens, hidden)
        return parts


def _totals(executed_parts: dict[str, Flops], needed_parts: dict[str, Flops]) -> MicroBatchFlops:
    return MicroBatchFlops(
        model=sum(flops.useful for flops in needed_parts.values()),
        hardware=sum(flops.total for flops in executed_parts.values()),
        parts=executed_parts,
    )


#: by class and no other: families that derive from one compute more
COUNTERS: dict[type, Any] = {
    FoveatedModel: FlopCounter,
    MultiTokenModel: OnePassCounter,
    BlindModel: OnePassCounter,
    PerceiverModel: ProjectedCounter,
    PrefixModel: ProjectedCounter,
    CrossAttentionModel: ProjectedCounter,
}
