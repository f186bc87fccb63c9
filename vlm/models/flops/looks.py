"""Operations of looks: the patch stream of all frames, and one query for each frame through it.

Not here: in which passes a family looks and reads (``vlm.models.flops.counters``).

Legend: F frames, P tokens of a frame in the tower.
"""

from typing import Any

from vlm.models.flops.layers import (
    Branch,
    Flops,
    Layer,
    attend,
    linear_map,
    mlp_branches,
    norms_train,
    trains,
)
from vlm.models.flops.shapes import Work
from vlm.models.foveated import FoveatedModel
from vlm.models.latent import LatentFoveation
from vlm.models.vision import VisionEncoder, projections


class PatchFlops:
    """Every frame through the tower's blocks, once."""

    def __init__(self, vision: VisionEncoder) -> None:
        self._vision = vision
        self.layers = [_tower_layer(layer) for layer in vision.layers]
        self._stem_trains = trains(vision.tower.embeddings)

    def frame_tokens(self, work: Work) -> tuple[int, int]:
        """P, and how many of those are patches."""
        height, width = self._vision.patch_size
        patches = (work.frame_size[0] // height) * (work.frame_size[1] // width)
        return self._vision.num_prefix_tokens + patches, patches

    def run(self, flops: Flops, work: Work, lean: bool) -> None:
        """Adds what it costs. Only keys and values are used of the last layer.

        Args:
            lean: blocks are computed again in the backward pass.
        """
        tokens, patches = self.frame_tokens(work)
        patch = self._vision.patch_size
        stem = 2.0 * work.num_frames * patches * 3 * patch[0] * patch[1] * self._vision.dim
        flops.forward += stem
        flops.backward += stem * self._stem_trains
        grad, num, pairs = self._stem_trains, work.num_frames * tokens, work.num_frames * tokens**2
        *whole, top = self.layers
        for layer in whole:
            grad = layer.run(flops, num, pairs, grad, lean)
        last = Flops()
        top.run(last, num, pairs, False)
        flops.forward += last.forward
        flops.backward += key_value(num, grad, top).backward

    def offered(self, work: Work, layer: Layer) -> Flops:
        """Keys and values of a layer, for queries."""
        grad = self._stem_trains or any(below.norms_train for below in self.layers)
        return key_value(work.num_frames * self.frame_tokens(work)[0], grad, layer)


class LookFlops:
    """Of the tower and connector of a foveated model, as they train now."""

    def __init__(self, model: FoveatedModel) -> None:
        connector = model.connector
        self._model, self._patches = model, PatchFlops(model.vision)
        self._query_in = linear_map(connector.query_input_proj)
        self._query_out = linear_map(connector.output_proj)
        self._to_language = linear_map(connector.dino_to_llm)
        self._to_query = linear_map(connector.llm_to_query)
        self._learned = any(p.requires_grad for p in connector.q_static.parameters())
        #: tokens are scaled by their own deviation, so that they are kept
        self._is_scaled = isinstance(connector, LatentFoveation)

    def see(self, parts: dict[str, Flops], work: Work, lean: bool) -> None:
        """The patch stream, before any look; ``lean``: blocks are computed again."""
        self._patches.run(parts["vision"], work, lean)

    def ask(self, parts: dict[str, Flops], work: Work, hidden: bool) -> bool:
        """Hidden states into the next queries; True if those ask for a gradient."""
        return self._to_query.run(parts["connector"], work.num_frames, hidden)

    def look(
        self, parts: dict[str, Flops], work: Work, asked: bool, lean: bool, *, first: bool
    ) -> bool:
        """Queries through connector, tower and connector; True if tokens ask for a gradient.

        Args:
            asked: the queries of the reading before ask for one.
        """
        own, query, num = Flops(), Flops(), work.num_frames
        grad = self._query_in.run(own, num, asked or self._learned)
        grad = self._query(query, work, grad, lean, first)
        grad = self._query_out.run(own, num, grad)
        grad = self._to_language.run(own, num, grad)
        if self._model.connector.gradient_checkpointing and grad:
            own.recompute += own.forward
            if not self._is_scaled:  # recomputing stops before a last map whose result nobody keeps
                own.recompute -= self._to_language.forward(num)
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


def key_value(tokens: int, grad: bool, layer: Layer) -> Flops:
    flops = Flops()
    _, key, value = layer.attention.inner
    key.run(flops, tokens, grad or layer.norms_train)
    value.run(flops, tokens, grad or layer.norms_train)
    return flops


def _tower_layer(layer: Any) -> Layer:
    maps = projections(layer)
    inner = tuple(linear_map(module) for module in (maps.query, maps.key, maps.value))
    return Layer(
        Branch(inner, linear_map(maps.output)),
        mlp_branches(layer.mlp),
        norms_train(layer),
        ends_in_map=False,
    )
