"""Floating-point operations of a micro-batch, from its shapes alone: for MFU, HFU and estimates.

A counter reads a model's sizes and what of it trains once, then counts any micro-batch in any
forward mode: the patch stream, the deep queries of each pass, the connector, the language model's
passes and its head. Two totals: ``model`` is what the mathematics needs for real tokens and frames
(MFU), ``hardware`` what is executed, with padding, blank frames and what gradient checkpointing
computes again (HFU). No model is run or timed here; what a count is made of is in the modules
beside this one. ``COUNTERS`` holds every family.

``tests/models/flops/test_counters.py`` holds it to ``torch.utils.flop_counter``.

Legend: F frames.
"""

from dataclasses import dataclass
from typing import Any

from vlm.models.baselines import BlindModel, MultiTokenModel
from vlm.models.cross_attention import CrossAttentionModel
from vlm.models.flops.layers import Context, Flops
from vlm.models.flops.looks import LookFlops
from vlm.models.flops.measured import of_frame, of_latent, of_prediction
from vlm.models.flops.shapes import Shapes, Work, executed, laid_out, needed
from vlm.models.flops.text import TextFlops
from vlm.models.foveated import FoveatedModel, Mode
from vlm.models.latent import TASKS, FoveatedLatentModel
from vlm.models.latent import Mode as LatentMode
from vlm.models.latent_layout import MARKERS
from vlm.models.one_pass import OnePass
from vlm.models.perceiver import PerceiverModel
from vlm.models.prefix import PrefixModel


@dataclass
class MicroBatchFlops:
    #: what the mathematics needs for real tokens and frames
    model: float
    #: what is executed
    hardware: float
    #: ``hardware`` by part, see ``PARTS``
    parts: dict[str, Flops]


PARTS = ("autoencoder", "vision", "query", "connector", "language", "head")


class FoveatedCounter:
    """Of one foveated model as it trains now: make a new one when a component thaws.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: FoveatedModel) -> None:
        self._model, self._looks = model, LookFlops(model)
        self._text = TextFlops(model.language)

    def micro_batch(self, shapes: Shapes, mode: Mode = "coarse_fine") -> MicroBatchFlops:
        """Forward and backward; only forward in a mode that has no gradient."""
        parts = self._count(executed(shapes, self._model.language.is_flat), mode)
        return _totals(parts, self._count(needed(shapes), mode))

    def _count(self, work: Work, mode: Mode) -> dict[str, Flops]:
        parts = {name: Flops() for name in PARTS}
        trains = mode in self._model.train_modes
        lean = trains and self._model.vision.gradient_checkpointing
        self._looks.see(parts, work, lean)
        if mode == "autoregressive":
            self._looks.look(parts, work, False, lean, first=True)
            self._looks.ask(parts, work, False)
            self._text.read(parts["language"], work.stepped, False)
            self._text.score(parts["head"], work.num_loss_tokens, False)
        else:
            self._passes(parts, work, mode, lean)
        return parts if trains else _forward(parts)

    def _passes(self, parts: dict[str, Flops], work: Work, mode: Mode, lean: bool) -> None:
        """Looks and readings in turn; each look but the first asks from the reading before."""
        model, asked = self._model, False
        weights = (model.coarse_weight, *model.fine_weights)
        if mode == "coarse_only":
            weights = (1.0,)
        for index, weight in enumerate(weights):
            tokens = self._looks.look(parts, work, asked, lean, first=index == 0)
            reach = work.full if weight > 0 else work.prefix
            hidden = self._text.read(parts["language"], reach, tokens)
            if weight > 0:
                self._text.score(parts["head"], work.num_loss_tokens, hidden)
            # the coarse mode asks, too, so that all parameters have a gradient
            if index + 1 < len(weights) or mode == "coarse_only":
                asked = self._looks.ask(parts, work, hidden)


class LatentCounter:
    """Of one model that also predicts latents, as it trains now.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: FoveatedLatentModel) -> None:
        self._model, self._looks = model, LookFlops(model)
        self._text = TextFlops(model.language)

    def micro_batch(self, shapes: Shapes, mode: LatentMode = "joint") -> MicroBatchFlops:
        """Forward and backward; only forward in a mode that has no gradient."""
        order = TASKS["joint" if mode == "autoregressive" else mode].order
        real, rows = laid_out(shapes, order), max(shapes.lengths) + MARKERS
        run = executed(real, self._model.language.is_flat, rows)
        # where no token is learned the head scores one, times zero
        run = run._replace(num_loss_tokens=max(1, run.num_loss_tokens))
        return _totals(self._count(run, mode), self._count(needed(real), mode))

    def _count(self, work: Work, mode: LatentMode) -> dict[str, Flops]:
        parts, model = {name: Flops() for name in PARTS}, self._model
        trains = mode in model.train_modes
        if model.connector.autoencoder is not None:
            latent = of_latent(model.connector.autoencoder, work.frame_size)
            parts["autoencoder"] = latent.times(work.num_frames)
        lean = trains and model.vision.gradient_checkpointing
        self._looks.see(parts, work, lean)
        markers = any(one.weight.requires_grad for one in model.connector.markers)
        if mode == "autoregressive":
            passes, reach = 1, work.stepped
        else:
            passes, reach = 1 + len(model.fine_weights), work.full
        hidden = False
        for index in range(passes):
            if index > 0 or mode == "autoregressive":
                hidden = self._looks.ask(parts, work, hidden)
            tokens = self._looks.look(parts, work, hidden, lean, first=index == 0)
            hidden = self._text.read(parts["language"], reach, tokens or markers)
            parts["connector"] += of_prediction(model.connector, hidden).times(work.num_frames)
        self._text.score(parts["head"], work.num_loss_tokens, hidden)
        return parts if trains else _forward(parts)


class OnePassCounter:
    """Of one model that reads every sample once, as it trains now.

    Raises:
        ConfigError: a language model whose layers are not attention and dense MLPs.
    """

    def __init__(self, model: OnePass) -> None:
        self._model, self._text = model, TextFlops(model.language)

    def micro_batch(self, shapes: Shapes, mode: Any = "one_pass") -> MicroBatchFlops:
        """Forward and backward; there is one mode."""
        parts = self._count(executed(shapes, self._model.language.is_flat))
        return _totals(parts, self._count(needed(shapes)))

    def _count(self, work: Work) -> dict[str, Flops]:
        parts, grad, context = {name: Flops() for name in PARTS}, False, None
        if not isinstance(self._model, BlindModel):
            frame = of_frame(self._model, work.frame_size)
            parts["vision"] = frame.vision.times(work.num_frames)
            parts["connector"] = frame.connector.times(work.num_frames)
            grad = frame.grad
            if isinstance(self._model, CrossAttentionModel):
                tokens, pairs = work.context
                context = Context(tokens * frame.num_tokens, pairs * frame.num_tokens, grad)
                grad = False  # of the text alone
        hidden = self._text.read(parts["language"], work.full, grad, context)
        self._text.score(parts["head"], work.num_loss_tokens, hidden)
        return parts


def _forward(parts: dict[str, Flops]) -> dict[str, Flops]:
    return {name: Flops(flops.forward) for name, flops in parts.items()}


def _totals(executed_parts: dict[str, Flops], needed_parts: dict[str, Flops]) -> MicroBatchFlops:
    return MicroBatchFlops(
        model=sum(flops.useful for flops in needed_parts.values()),
        hardware=sum(flops.total for flops in executed_parts.values()),
        parts=executed_parts,
    )


#: by class and no other: families that derive from one compute more
COUNTERS: dict[type, Any] = {
    FoveatedModel: FoveatedCounter,
    FoveatedLatentModel: LatentCounter,
    MultiTokenModel: OnePassCounter,
    BlindModel: OnePassCounter,
    PerceiverModel: OnePassCounter,
    PrefixModel: OnePassCounter,
    CrossAttentionModel: OnePassCounter,
}
