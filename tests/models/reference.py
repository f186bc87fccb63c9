"""The foveated model sample by sample, with whole forwards and loops: no cache, no rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.tiny import IMAGE
from vlm.batch import Batch, build_batch
from vlm.models.foveated import FoveatedModel, Mode
from vlm.models.generate import generate


def sample(batch: Batch, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, ids and labels of one sample."""
    a, b = batch.cu_seqlens[index], batch.cu_seqlens[index + 1]
    first, last = batch.cu_frames[index], batch.cu_frames[index + 1]
    return batch.frames[first:last], batch.input_ids[a:b], batch.labels[a:b]


def single(batch: Batch, index: int, per_frame: int = 1) -> Batch:
    """One sample as a batch of its own, with a blank frame if it has none."""
    frames, ids, labels = sample(batch, index)
    count, latents = len(frames), None
    if batch.latents is not None:
        own = batch.latents[batch.cu_frames[index] : batch.cu_frames[index + 1]]
        latents = own if count else torch.zeros_like(batch.latents[:1])
    return build_batch(
        frames=frames if count else torch.zeros_like(batch.frames[:1]),
        frame_counts=[count],
        input_ids=[ids.tolist()],
        labels=[labels.tolist()],
        image_token_id=IMAGE,
        tokens_per_frame=per_frame,
        keys=["alone"],
        kind="video" if count else "text",
        latents=latents,
    )


def plain_hidden(model: FoveatedModel, frames: Tensor, ids: Tensor, queries: Tensor) -> Tensor:
    """(N, H) of one sample by the language model's own forward, given the query of each frame."""
    embeds = model.language.embed(ids).clone()
    if len(frames):
        connector = model.connector
        _, cache = model.vision(frames)
        looked = model.vision.look(connector.query_input_proj(queries), cache)
        tokens = connector.dino_to_llm(connector.output_proj(looked))
        embeds[_frames_at(ids, frames)] = connector.visual_scale * tokens
    return model.language.lm.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]


def plain_queries(
    model: FoveatedModel, frames: Tensor, ids: Tensor, mode: Mode, passes: int = 0
) -> Tensor:
    """(F, Q): with what each frame of one sample is looked at in the mode's last pass.

    Args:
        passes: fine passes, if not all of the model's.
    """
    connector, count = model.connector, len(frames)
    static = connector.q_static.weight.expand(count, -1)
    if mode == "coarse_only" or not count:
        return static
    if mode == "coarse_fine":
        queries = static
        for _ in range(passes or len(model.fine_weights)):
            hidden = plain_hidden(model, frames, ids, queries)
            asked = connector.llm_to_query(hidden[_frames_at(ids, frames)])
            queries = torch.cat([connector.q_init.weight, asked[:-1]])
        return queries
    queries = connector.q_init.weight
    while len(queries) < count:  # what later frames are looked at with changes nothing before
        padded = torch.cat([queries, torch.zeros_like(static)])[:count]
        hidden = plain_hidden(model, frames, ids, padded)
        state = hidden[_frames_at(ids, frames)][len(queries) - 1]
        queries = torch.cat([queries, connector.llm_to_query(state)[None]])
    return queries


def _frames_at(ids: Tensor, frames: Tensor) -> Tensor:
    # what a model says later may well be a placeholder, too
    return (ids == IMAGE).nonzero().flatten()[: len(frames)]


def check_losses(model: Any, batch: Batch, hidden: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """A family that reads once: its loss against that of each sample by itself."""
    expected = 0.0
    for index in range(batch.num_samples):
        frames, ids, labels = sample(batch, index)
        logits = model.language.logits(hidden(model, frames, ids))
        loss = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        expected += float(loss.detach())
    out = model(batch)
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=1e-6) and out.parts == {}
    assert float(model.losses_by_mode(batch)["one_pass"]) == pytest.approx(expected, rel=1e-6)


def check_greedy(
    model: Any, batch: Batch, hidden: Callable[[Any, Tensor, Tensor], Tensor], num_tokens: int
) -> None:
    """Generation against a forward over everything so far, token by token."""
    found = generate(model, batch, eos_token_id=-1, max_new_tokens=num_tokens)
    for index, new in enumerate(found):
        frames, ids, _ = sample(batch, index)
        assert len(new) == num_tokens
        for token in new:
            with torch.no_grad():
                logits = model.language.logits(hidden(model, frames, ids)[-1])
            assert token == int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([token])])
