"""Floating-point operations of a micro-batch, from its shapes alone: for MFU, HFU and estimates.

``FlopCounter`` reads a model's sizes and what of it trains once, then counts any micro-batch in
any forward mode: the patch stream, the deep queries of each pass, the connector, the language
model's passes and its head. Two totals: ``model`` is what the mathematics needs for real tokens
and frames (MFU), ``hardware`` what is executed, with padding, blank frames and what gradient
checkpointing computes again (HFU). Nothing is run or timed here; what a count is made of is in
``vlm.models.flop_blocks``.

``tests/models/test_flops.py`` holds it to ``torch.utils.flop_counter``.

Legend: S samples, F frames, P tokens of a frame in the tower, N tokens, L longest sample.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm.batch import Batch
from vlm.models.flop_blocks import (
    Branch,
    Flops,
    Layer,
    attend,
    decoder_layers,
    linear_map,
    mlp_branches,
    norms_train,
)
from vlm.models.foveated import FoveatedModel, Mode
from vlm.models.vision import projections


class Shapes(NamedTuple):
    """All of a micro-batch that its cost follows from."""

    #: tokens of each sample, placeholders included
    lengths: tuple[int, ...]
    #: tokens of each sample up to its last frame; 0 without one
    prefixes: tuple[int, ...]
    #: owned by samples; 0 if a blank one stands in
    num_frames: int
    num_loss_tokens: int
    #: height and width of frames, px
    frame_size: tuple[int, int]


def shapes_of(batch: Batch) -> Shapes:
    """Reads them on the host: call it with a batch that is not on a GPU yet."""
    owned = batch.cu_frames.diff()
    prefixes = torch.zeros_like(owned)
    if batch.has_frames:
        per_frame = len(batch.frame_index) // int(batch.cu_frames[-1])
        last = batch.frame_index[batch.cu_frames[1:][owned > 0] * per_frame - 1]
        prefixes[owned > 0] = batch.position_ids[last] + 1
    height, width = batch.frames.shape[-2:]
    return Shapes(
        lengths=tuple(batch.cu_seqlens.diff().tolist()),
        prefixes=tuple(prefixes.tolist()),
        num_frames=int(owned.sum()),
        num_loss_tokens=batch.num_loss_tokens,
        frame_size=(height, width),
    )


class _Pass(NamedTuple):
    """What goes through the language model at once."""

    tokens: int
    #: of a query and a key
    pairs: float


class _Work(NamedTuple):
    num_frames: int
    num_loss_tokens: int
    frame_size: tuple[int, int]
    full: _Pass
    prefix: _Pass
    #: the whole of it when frames are read one after another
    stepped: _Pass


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
    """Of one model as it trains now: make a new one when a component thaws.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: FoveatedModel) -> None:
        self._model, vision, language = model, model.vision, model.language
        self._tower = [_tower_layer(layer) for layer in vision.layers]
        self._decoder = decoder_layers(language.lm.get_decoder())
        self._head = linear_map(language.lm.get_output_embeddings())
        connector = model.connector
        self._query_in = linear_map(connector.query_input_proj)
        self._query_out = linear_map(connector.output_proj)
        self._to_language = linear_map(connector.dino_to_llm)
        self._to_query = linear_map(connector.llm_to_query)
        self._learned = any(p.requires_grad for p in connector.q_static.parameters())
        self._text_trains = _trains(language.lm.get_input_embeddings())
        self._patches_train = _trains(vision.tower.embeddings)

    def micro_batch(self, shapes: Shapes, mode: Mode = "coarse_fine") -> MicroBatchFlops:
        """Forward and backward; only forward in a mode that has no gradient."""
        parts = self._count(_executed(shapes, self._model.language.is_flat), mode)
        needed = self._count(_needed(shapes), mode)
        return MicroBatchFlops(
            model=sum(flops.useful for flops in needed.values()),
            hardware=sum(flops.total for flops in parts.values()),
            parts=parts,
        )

    def _count(self, work: _Work, mode: Mode) -> dict[str, Flops]:
        parts = {name: Flops() for name in PARTS}
        trains = mode in self._model.train_modes
        lean = trains and self._model.vision.gradient_checkpointing
        self._patches(parts["vision"], work, lean)
        if mode == "autoregressive":
            self._look(parts, work, self._learned, lean, first=True)
            self._to_query.run(parts["connector"], work.num_frames, False)
            self._language(parts["language"], work.stepped, False)
            self._score(parts["head"], work, False)
        else:
            self._passes(parts, work, mode, lean)
        if not trains:
            parts = {name: Flops(flops.forward) for name, flops in parts.items()}
        return parts

    def _passes(self, parts: dict[str, Flops], work: _Work, mode: Mode, lean: bool) -> None:
        """Looks and readings in turn; each look but the first asks from the reading before."""
        model, asked = self._model, False
        weights = (model.coarse_weight, *model.fine_weights)
        if mode == "coarse_only":
            weights = (1.0,)
        for index, weight in enumerate(weights):
            grad = asked or self._learned
            tokens = self._look(parts, work, grad, lean, first=index == 0)
            reach = work.full if weight > 0 else work.prefix
            hidden = self._language(parts["language"], reach, tokens)
            if weight > 0:
                self._score(parts["head"], work, hidden)
            # the coarse mode asks, too, so that all parameters have a gradient
            if index + 1 < len(weights) or mode == "coarse_only":
                asked = self._to_query.run(parts["connector"], work.num_frames, hidden)

    def _patches(self, flops: Flops, work: _Work, lean: bool) -> None:
        """The patch stream. Only keys and values are used of its last layer."""
        tokens, patches = self._frame_tokens(work)
        patch = self._model.vision.patch_size
        embedding = 2.0 * work.num_frames * patches * 3 * patch[0] * patch[1]
        embedding *= self._model.vision.dim
        flops.forward += embedding
        flops.backward += embedding * self._patches_train
        grad, num = self._patches_train, work.num_frames * tokens
        for layer in self._tower[:-1]:
            grad = layer.run(flops, num, work.num_frames * tokens**2, grad, lean)
        last = Flops()
        self._tower[-1].run(last, num, work.num_frames * tokens**2, False)
        flops.forward += last.forward
        flops.backward += self._key_value(num, grad, self._tower[-1]).backward

    def _look(
        self, parts: dict[str, Flops], work: _Work, grad: bool, lean: bool, *, first: bool
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
                    self._offered(work, layer).forward for layer in self._looked_at
                )
        parts["connector"] += own
        parts["query"] += query
        return grad

    def _query(self, flops: Flops, work: _Work, grad: bool, lean: bool, first: bool) -> bool:
        """One token per frame through the tower's layers; it attends, no patch attends to it."""
        vision, num = self._model.vision, work.num_frames
        pairs = num * (self._frame_tokens(work)[0] + vision.sees_itself)
        for layer in self._looked_at:
            own, offered = Flops(), self._offered(work, layer)
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
                if not (first and layer is self._tower[-1]):
                    own.recompute += offered.backward
            flops += own
        return grad

    @property
    def _looked_at(self) -> list[Layer]:
        return self._tower[-1:] if self._model.vision.shallow else self._tower

    def _offered(self, work: _Work, layer: Layer) -> Flops:
        """Keys and values of a layer, for queries."""
        grad = self._patches_train or any(below.norms_train for below in self._tower)
        return self._key_value(work.num_frames * self._frame_tokens(work)[0], grad, layer)

    @staticmethod
    def _key_value(tokens: int, grad: bool, layer: Layer) -> Flops:
        flops = Flops()
        _, key, value = layer.attention.inner
        key.run(flops, tokens, grad or layer.norms_train)
        value.run(flops, tokens, grad or layer.norms_train)
        return flops

    def _language(self, flops: Flops, reach: _Pass, grad: bool) -> bool:
        modules = self._model.language.lm.modules()
        recomputed = any(
            hasattr(m, "gradient_checkpointing") and m.gradient_checkpointing for m in modules
        )
        # where transformers recomputes, it makes embeddings ask for a gradient
        grad = grad or self._text_trains or recomputed
        for layer in self._decoder:
            grad = layer.run(flops, reach.tokens, reach.pairs, grad, recomputed)
        return grad

    def _score(self, flops: Flops, work: _Work, grad: bool) -> None:
        own = Flops()
        asks = self._head.run(own, work.num_loss_tokens, grad)
        if self._model.language.num_loss_chunks > 1 and asks:
            own.recompute = own.forward
        flops += own

    def _frame_tokens(self, work: _Work) -> tuple[int, int]:
        """P, and how many of those are patches."""
        height, width = self._model.vision.patch_size
        patches = (work.frame_size[0] // height) * (work.frame_size[1] // width)
        return self._model.vision.num_prefix_tokens + patches, patches


def _executed(shapes: Shapes, flat: bool) -> _Work:
    """With padding, and a blank frame where there is none."""
    longest, prefix = max(shapes.lengths), max(1, *shapes.prefixes)
    if flat:
        full = _flat(shapes.lengths)
        reach = _flat(tuple(min(length, prefix) for length in shapes.lengths))
    else:
        full = _flat((longest,) * len(shapes.lengths))
        reach = _flat((prefix,) * len(shapes.lengths))
    read = prefix if shapes.num_frames else 0
    stepped = [_stepped(longest, read)] * len(shapes.lengths)
    return _Work(
        max(1, shapes.num_frames),
        shapes.num_loss_tokens,
        shapes.frame_size,
        full,
        reach,
        _Pass(longest * len(shapes.lengths), sum(stepped)),
    )


def _needed(shapes: Shapes) -> _Work:
    stepped = map(_stepped, shapes.lengths, shapes.prefixes)
    return _Work(
        shapes.num_frames,
        shapes.num_loss_tokens,
        shapes.frame_size,
        _flat(shapes.lengths),
        _flat(shapes.prefixes),
        _Pass(sum(shapes.lengths), sum(stepped)),
    )


def _flat(lengths: tuple[int, ...]) -> _Pass:
    return _Pass(sum(lengths), float(sum(length**2 for length in lengths)))


def _stepped(length: int, prefix: int) -> float:
    """Pairs of a sample that is read token by token up to its last frame, then at once."""
    return prefix * (prefix + 1) / 2 + (length - prefix) * length


def _tower_layer(layer: Any) -> Layer:
    maps = projections(layer)
    inner = tuple(linear_map(module) for module in (maps.query, maps.key, maps.value))
    return Layer(
        Branch(inner, linear_map(maps.output)),
        mlp_branches(layer.mlp),
        norms_train(layer),
        ends_in_map=False,
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
