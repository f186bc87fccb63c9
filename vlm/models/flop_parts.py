"""Operations of the parts that families share: the tower's patch stream, the language model.

Not here: what a family does with them (``vlm.models.flops``), and what layers are made of
(``vlm.models.flop_blocks``).

Legend: F frames, P tokens of a frame in the tower.
"""

from typing import Any

from torch import nn

from vlm.models.flop_blocks import (
    Branch,
    Context,
    Flops,
    Layer,
    decoder_layers,
    linear_map,
    mlp_branches,
    norms_train,
)
from vlm.models.flop_work import Pass, Work
from vlm.models.language import LanguageModel
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

    def run(self, flops: Flops, work: Work, lean: bool, *, for_queries: bool) -> bool:
        """Adds what it costs; True if the tokens ask for a gradient.

        Args:
            lean: blocks are computed again in the backward pass.
            for_queries: only keys and values are used of the last layer.
        """
        tokens, patches = self.frame_tokens(work)
        patch = self._vision.patch_size
        stem = 2.0 * work.num_frames * patches * 3 * patch[0] * patch[1] * self._vision.dim
        flops.forward += stem
        flops.backward += stem * self._stem_trains
        grad, num, pairs = self._stem_trains, work.num_frames * tokens, work.num_frames * tokens**2
        whole = self.layers[:-1] if for_queries else self.layers
        for layer in whole:
            grad = layer.run(flops, num, pairs, grad, lean)
        if for_queries:
            last = Flops()
            self.layers[-1].run(last, num, pairs, False)
            flops.forward += last.forward
            flops.backward += key_value(num, grad, self.layers[-1]).backward
        return grad

    def offered(self, work: Work, layer: Layer) -> Flops:
        """Keys and values of a layer, for queries."""
        grad = self._stem_trains or any(below.norms_train for below in self.layers)
        return key_value(work.num_frames * self.frame_tokens(work)[0], grad, layer)


class TextFlops:
    """Passes of the language model, and its head."""

    def __init__(self, language: LanguageModel) -> None:
        self._language = language
        self._layers = decoder_layers(language.lm.get_decoder())
        self._head = linear_map(language.lm.get_output_embeddings())
        self._embeddings_train = trains(language.lm.get_input_embeddings())

    def read(self, flops: Flops, reach: Pass, grad: bool, context: Context | None = None) -> bool:
        """One pass; ``grad``: visual tokens ask for a gradient."""
        modules = self._language.lm.modules()
        recomputed = any(
            hasattr(m, "gradient_checkpointing") and m.gradient_checkpointing for m in modules
        )
        # where transformers recomputes, it makes embeddings ask for a gradient
        grad = grad or self._embeddings_train or recomputed
        for layer in self._layers:
            grad = layer.run(flops, reach.tokens, reach.pairs, grad, recomputed, context)
        return grad

    def score(self, flops: Flops, num_loss_tokens: int, grad: bool) -> None:
        own = Flops()
        asks = self._head.run(own, num_loss_tokens, grad)
        if self._language.num_loss_chunks > 1 and asks:
            own.recompute = own.forward
        flops += own


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


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
