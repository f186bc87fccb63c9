"""The older foveated family: it also predicts what an autoencoder makes of the next frame.

1. A micro-batch is laid out anew for its mode (``vlm.models.latent_layout``): the mode token stands
   before the frames, the text before it (``reconstruction``), nowhere (``unconditioned``) or
   behind the frames and an end token (``caption``, ``joint``).
2. Coarse and fine passes as in ``vlm.models.foveated``, each with its own mode token; visual tokens
   are scaled to one standard deviation each, the same in training and frame after frame.
3. The state before a frame and the latent of the frame before it predict the frame's latent, in
   every pass with one head. A frame's loss is the mean square error of its latent's numbers; it
   counts as much as that of one learned token.

Latents come with the batch, or from a frozen autoencoder as they are needed.

Legend: N tokens, F frames, S samples, H language width, C x s x s numbers of a latent.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlm.autoencoder import autoencoder, shapes_of
from vlm.batch import Batch
from vlm.errors import ConfigError
from vlm.models.family import FamilyConfig, Output, Prefill
from vlm.models.foveated import FoveatedModel, at_frames, first_frames
from vlm.models.foveation import Foveation, LearnedQuery
from vlm.models.latent_heads import HEADS
from vlm.models.latent_layout import Layout, Order, lay_out
from vlm.models.splice import fill
from vlm.models.vision import LayerCache, VisionEncoder

Mode = Literal["joint", "caption", "reconstruction", "unconditioned", "autoregressive"]
#: keeps a token that is constant from becoming infinite
EPS = 1e-6


class Task(NamedTuple):
    order: Order
    #: weights of the two losses; None: the connector's `reconstruction_weight`
    caption: float
    reconstruction: float | None


TASKS: dict[Mode, Task] = {
    "joint": Task("frames first", 1.0, None),
    "caption": Task("frames first", 1.0, 0.0),
    "reconstruction": Task("text first", 0.0, 1.0),
    "unconditioned": Task("no text", 0.0, 1.0),
}


class Passes(NamedTuple):
    """What the coarse pass and the fine ones leave."""

    #: (N, H) each
    hidden: list[Tensor]
    #: of the tower
    cache: list[LayerCache]
    #: of "coarse" and the last "fine" pass: queries (F, Q) and tokens (F, H)
    seen: dict[str, tuple[Tensor, Tensor]]


class LatentConfig(FamilyConfig):
    model_type = "saccade_foveated_latent"


class LatentFoveation(Foveation):
    """Foveation, the learned tokens of the sequence, and the head."""

    def __init__(
        self,
        *,
        language_dim: int,
        head: str,
        latent_channels: int,
        latent_size: int,
        reconstruction_weight: float,
        autoencoder: str | None,
        **foveation: Any,
    ) -> None:
        super().__init__(language_dim=language_dim, **foveation)
        self.reconstruction_weight, self.autoencoder = reconstruction_weight, autoencoder
        self.latent_shape = (latent_channels, latent_size, latent_size)
        std = self.visual_scale
        self.coarse_token = LearnedQuery(language_dim, std)
        self.fine_token = LearnedQuery(language_dim, std)
        self.no_text_token = LearnedQuery(language_dim, std)
        self.end_token = LearnedQuery(language_dim, std)
        self.z_vae_init = LearnedQuery(latent_channels * latent_size**2, 0.0)
        self.head = HEADS[head](language_dim, latent_channels, latent_size)

    @property
    def markers(self) -> tuple[LearnedQuery, ...]:
        """The learned tokens of the sequence."""
        return self.coarse_token, self.fine_token, self.no_text_token, self.end_token

    def _look(self, vision: VisionEncoder, cache: list[LayerCache], queries: Tensor) -> Tensor:
        token = super()._look(vision, cache, queries)
        std = token.std(dim=-1, keepdim=True, correction=0)
        return self.visual_scale * token / (std + EPS)

    def predict(self, states: Tensor, latents: Tensor, is_first: Tensor) -> Tensor:
        """(F, H) states before the frames, (F, C, s, s) their latents -> what is expected of them.

        A frame's own latent is not seen: the head gets that of the frame before, ``z_vae_init`` at
        a sample's first.
        """
        start = self.z_vae_init(len(latents)).view_as(latents)
        previous = torch.where(is_first[:, None, None, None], start, latents.roll(1, dims=0))
        return self.head(states, previous)


class FoveatedLatentModel(FoveatedModel):
    """``loss_sum`` is that of the mode; "fine", "coarse" are square errors, "caption" entropy."""

    config_class = LatentConfig
    connector_class = LatentFoveation
    connector: LatentFoveation
    modes: tuple[Mode, ...] = (*TASKS, "autoregressive")  # type: ignore[assignment]
    train_modes: tuple[Mode, ...] = tuple(TASKS)  # type: ignore[assignment]
    passes: dict[str, tuple[str, ...]] = {task: ("fine", "coarse") for task in TASKS}

    def forward(  # type: ignore[override]
        self, batch: Batch, mode: Mode = "joint", measure_all: bool = False
    ) -> Output:
        """Losses of one micro-batch; all are measured in any case.

        Args:
            measure_all: also measure how frames were looked at, but for ``autoregressive``.

        Raises:
            ConfigError: no latents in the batch and no autoencoder, or latents of another size.
        """
        task = TASKS["joint" if mode == "autoregressive" else mode]
        layout, latents = lay_out(batch, task.order), self.latents(batch)
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        if mode == "autoregressive":
            text = self._embeds(layout, self.connector.fine_token)
            states = [self.autoregressive_hidden(layout.batch, text)]
        else:
            states, cache, seen = self._passes(layout)
            if measure_all:
                found = self.looked(batch, cache, self.language.embed(batch.input_ids), seen)
        errors = [self._errors(hidden, layout.batch, latents) for hidden in states]
        parts = {"fine": errors[-1]}
        factor = task.reconstruction
        factor = self.connector.reconstruction_weight if factor is None else factor
        weights = [1.0]
        if len(errors) > 1:
            parts["coarse"], weights = errors[0], [self.coarse_weight, *self.fine_weights]
        loss = factor * torch.stack([w * e for w, e in zip(weights, errors, strict=True)]).sum()
        if len(layout.batch.targets):
            losses = self.language.token_losses(states[-1], layout.batch)
            parts["caption"] = losses.sum()
            return Output(loss + task.caption * parts["caption"], parts, losses.detach(), *found)
        # every parameter gets a gradient in every mode, or ZeRO-3 keeps that of the step before
        scored = (
            self.language.logits(states[-1][:1]).sum()
            + self.language.embed(batch.input_ids[:1]).sum()
        )
        return Output(loss + 0.0 * scored.to(loss.dtype), parts, None, *found)

    def latents(self, batch: Batch) -> Tensor:
        """(F, C, s, s) of all frames."""
        found = batch.latents
        if found is None:
            if self.connector.autoencoder is None:
                raise ConfigError(
                    "model.connector.autoencoder: the samples bring no latents and no autoencoder "
                    "is named; name one, or precompute them (tools/precompute.py --latents)"
                )
            load = shapes_of if batch.frames.is_meta else autoencoder
            found = load(self.connector.autoencoder).encode(batch.frames)
        if found.shape[1:] != self.connector.latent_shape:
            wanted = " x ".join(map(str, self.connector.latent_shape))
            raise ConfigError(
                f"latents of {' x '.join(map(str, found.shape[1:]))}, expected {wanted}; set "
                "model.connector.latent_channels and latent_size to them"
            )
        return found.to(batch.frames.device, self.connector.llm_to_query.weight.dtype)

    @torch.no_grad()
    def predictions(self, batch: Batch, mode: Mode = "unconditioned") -> Tensor:
        """(F, C, s, s) latents that the last fine pass expects; an autoencoder decodes them."""
        layout, latents = lay_out(batch, TASKS[mode].order), self.latents(batch)
        return self._predict(self._passes(layout).hidden[-1], layout.batch, latents)

    @torch.no_grad()
    def losses_by_mode(self, batch: Batch) -> dict[str, Tensor]:
        parts = self(batch, mode="joint").parts
        fine = self(batch, mode="autoregressive").parts["fine"]
        by_mode = {"coarse_only": parts["coarse"], "coarse_fine": parts["fine"]}
        return {**by_mode, "autoregressive": fine, "caption": parts["caption"]}

    def prefill(self, batch: Batch, mode: Mode) -> Prefill:  # type: ignore[override]
        layout = lay_out(batch, "frames first")
        if mode == "autoregressive":
            text = self._embeds(layout, self.connector.fine_token)
            hidden, kv, _ = self.autoregressive_rows(layout.batch, text)
            return Prefill(hidden, kv, layout.batch.cu_seqlens.diff())
        _, cache = self.vision(batch.frames)
        queries, marker = self.static_queries(batch), self.connector.coarse_token
        for _ in self.fine_weights:
            _, embeds = self._look(layout, cache, queries, marker)
            asking = self.language(embeds, layout.batch, prefix_only=True)
            queries, marker = self.next_queries(batch, asking), self.connector.fine_token
        _, embeds = self._look(layout, cache, queries, marker)
        return self.language.prefill(embeds, layout.batch)

    def _passes(self, layout: Layout) -> Passes:
        batch = layout.batch
        found: list[Tensor] = []
        _, cache = self.vision(batch.frames)
        queries, marker = self.static_queries(batch), self.connector.coarse_token
        seen = {}
        for name in ("coarse", *["fine"] * len(self.fine_weights)):
            if found:
                queries = self.next_queries(batch, at_frames(found[-1], batch))
                marker = self.connector.fine_token
            tokens, embeds = self._look(layout, cache, queries, marker)
            seen[name] = (queries, tokens)
            found.append(self.language(embeds, batch))
        return Passes(found, cache, seen)

    def _look(
        self, layout: Layout, cache: list[LayerCache], queries: Tensor, marker: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The tokens (F, H) of a look with queries (F, Q), and the (N, H) that is read of it."""
        tokens = self.connector(self.vision, cache, queries)
        return tokens, fill(self._embeds(layout, marker), layout.batch.frame_index, tokens)

    def _embeds(self, layout: Layout, marker: nn.Module) -> Tensor:
        """(N, H) text and learned tokens; those without a place take part, times zero."""
        connector = self.connector
        embeds = self.language.embed(layout.batch.input_ids)
        placed = (
            (marker, layout.mode_index),
            (connector.end_token, layout.end_index),
            (connector.no_text_token, layout.no_text_index),
        )
        for token, index in placed:
            embeds = fill(embeds, index, token(max(1, len(index))))
        return embeds

    def _predict(self, hidden: Tensor, batch: Batch, latents: Tensor) -> Tensor:
        before = hidden[batch.frame_index - 1] if batch.has_frames else hidden[:1]
        return self.connector.predict(before, latents, first_frames(batch))

    def _errors(self, hidden: Tensor, batch: Batch, latents: Tensor) -> Tensor:
        """Sum over frames of mean square errors; a blank frame that nobody owns counts nothing."""
        predicted = self._predict(hidden, batch, latents)
        errors = (predicted - latents).float().square().flatten(1).mean(1).sum()
        return errors if batch.has_frames else 0.0 * errors
