"""Operations of the language model: its passes, and its head.

Not here: which passes a family makes (``vlm.models.flops.counters``).
"""

from vlm.models.flops.layers import Context, Flops, decoder_layers, linear_map, trains
from vlm.models.flops.shapes import Pass
from vlm.models.language import LanguageModel


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
