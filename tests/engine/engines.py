"""Tiny engines and global steps, for tests that run them on several ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests.models import tiny
from tests.train import helpers
from vlm.batch import Batch, build_batch
from vlm.config import Recipe
from vlm.engine.setup import build_engine
from vlm.models.foveated import FoveatedModel

#: (frames, text tokens) of the samples of each micro-batch of a global step. Dealt in order to two
#: ranks of two, text meets several frames and one frame meets a mixture.
Shapes = tuple[list[tuple[int, int]], ...]
MICRO_BATCHES: Shapes = (
    [(0, 5), (0, 9)],
    [(1, 6)],
    [(4, 7), (2, 4)],
    [(3, 5), (0, 6), (1, 4)],
)
#: a rank of three that has text only, one that has images only, one that has video only
MODALITIES: Shapes = ([(0, 5), (0, 9)], [(1, 6), (1, 4)], [(4, 7), (2, 4)])
#: enough for eight ranks
EIGHT: Shapes = (*MICRO_BATCHES, *MODALITIES, [(2, 3)])


def recipe(*overrides: str) -> Recipe:
    """Adam with an epsilon so large that an update is as exact as its gradient."""
    return helpers.recipe(
        Path("unused"), "optim.eps=1e-3", "optim.schedule.name=constant", *overrides
    )


def make_model(coarse_weight: float = 0.5) -> FoveatedModel:
    return tiny.make_model(seed=3, coarse_weight=coarse_weight).float().train()


def make_lora_model(coarse_weight: float = 0.5) -> FoveatedModel:
    """The language model wrapped by PEFT, with adapters that are not zero at the start."""
    model = make_model(coarse_weight)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model.language.lm = peft.get_peft_model(model.language.lm, config)
    return model


def micro_batches(seed: int, shapes: Shapes = MICRO_BATCHES) -> list[Batch]:
    return [join(samples) for samples in _samples(seed, shapes)]


def flat_batch(seed: int, shapes: Shapes = MICRO_BATCHES) -> Batch:
    """The samples of all micro-batches as one."""
    return join([sample for samples in _samples(seed, shapes) for sample in samples])


def _samples(seed: int, micro_batches: Shapes) -> list[list[Batch]]:
    return [
        [tiny.make_batch([shape], seed=100 * seed + 10 * i + j) for j, shape in enumerate(shapes)]
        for i, shapes in enumerate(micro_batches)
    ]


def join(samples: Sequence[Batch]) -> Batch:
    """Batches of one sample each, as one batch."""
    owned = [s.frames for s in samples if s.has_frames]
    return build_batch(
        frames=torch.cat(owned) if owned else samples[0].frames,
        frame_counts=[int(s.cu_frames[-1]) for s in samples],
        input_ids=[s.input_ids.tolist() for s in samples],
        labels=[s.labels.tolist() for s in samples],
        image_token_id=tiny.IMAGE,
        tokens_per_frame=1,
        keys=[key for s in samples for key in s.keys],
        kind="video" if owned else "text",
    )


def make_engine(
    stage: int | str,
    recipe: Recipe,
    model: FoveatedModel,
    micro_batches: int = len(MICRO_BATCHES),
    **changes: Any,
) -> Any:
    """``stage`` is what a file of ds_configs/ is called by, ``changes`` are sections of it."""
    config = helpers.resolved(stage, torch.distributed.get_world_size(), micro_batches)
    return build_engine(model, recipe, {**config, **changes}, cpu=True)


def mine(batches: Sequence[Batch]) -> Sequence[Batch]:
    """This rank's share."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = len(batches) // world_size
    return batches[rank * size : (rank + 1) * size]


def weights(engine: Any) -> dict[str, np.ndarray]:
    """All weights, whole; under ZeRO-3 on rank 0 only."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict() or {}
    else:
        state = engine.module.state_dict()
    return {name: value.detach().clone().numpy() for name, value in state.items()}
