"""What a run will have to compute and hold, before it starts: micro-batches of its plan, as shapes.

Every step that the run will take is planned, one window at a time. Without manifests a stated worst
case stands in for a plan: micro-batches full of the longest videos that a sample may hold. Not
here: memory and speed of them (``vlm.estimate.estimate``).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm.batch import IGNORE_INDEX, Batch, build_batch
from vlm.config import Recipe
from vlm.data.load.collate import frame_size
from vlm.data.plan import planning
from vlm.data.plan.plan import MicroBatch, Plan, Step, assign
from vlm.models.flops.shapes import Shapes

#: steps of the plan whose operations are counted
COUNTED_STEPS = 64
#: a long video and a long conversation, where there is no manifest and the budget allows them
ASSUMED_FRAMES, ASSUMED_TEXT = 64, 256
#: tokens of a conversation before its first frame
HEADER = 4
#: weights of padded tokens, frames, frames padded as tokens are, and learned tokens: each alone,
#: where among equals the one with more of the rest counts, and all together
ASPECTS = np.vstack([np.eye(4) + 1e-6, np.ones(4)])


@dataclass(frozen=True)
class Workload:
    #: where the numbers are from
    source: str
    #: micro-batches of the run one of which asks for most memory
    worst: tuple[Shapes, ...]
    #: some global steps, each as its ranks share it
    steps: tuple[tuple[tuple[Shapes, ...], ...], ...]


def of_recipe(
    recipe: Recipe,
    assumed_size: tuple[int, int],
    world_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Workload:
    """
    Args:
        assumed_size: height and width of frames where no manifest says it, px.
        progress: Called with (steps looked at, steps of the run) after each window.

    Raises:
        DataError: some of the manifests are missing or damaged.
        ConfigError: the ranks cannot share a step equally.
    """
    if any(source.manifest.is_file() for source in recipe.data.train):
        return _planned(recipe, world_size, progress)
    shapes = _assumed(recipe, assumed_size)
    per_rank = recipe.data.micro_batches // world_size
    num = len(shapes.lengths)
    return Workload(
        f"assumed, as no manifest is there: micro-batches of {num} samples with "
        f"{shapes.frames[0]} frames of {assumed_size[0]} x {assumed_size[1]} px and "
        f"{shapes.num_loss_tokens // num} text tokens, all learned",
        (shapes,),
        (((shapes,) * per_rank,) * world_size,),
    )


def _assumed(recipe: Recipe, size: tuple[int, int]) -> Shapes:
    """Full of the longest samples that the budget allows."""
    data, per_frame = recipe.data, recipe.model.connector.tokens_per_frame
    text = max(1, min(ASSUMED_TEXT, int(data.budget // 2)))
    frames = max(source.max_frames or ASSUMED_FRAMES for source in data.train)
    if (each := per_frame + data.frame_cost) > 0:
        frames = max(1, min(frames, int((data.budget - text) // each)))
    num = max(1, int(data.budget // (text + frames * each)))
    length, placeholders = frames * per_frame + text, frames * per_frame
    return Shapes(
        lengths=(length,) * num,
        prefixes=(min(length, placeholders + HEADER) if placeholders else 0,) * num,
        frames=(frames,) * num,
        num_loss_tokens=num * text,
        frame_size=size,
    )


def _planned(
    recipe: Recipe, world_size: int, progress: Callable[[int, int], None] | None
) -> Workload:
    catalog, plan = planning.open_plan(recipe)
    size, num_steps = frame_size(catalog), recipe.train.steps
    chosen = set(np.linspace(0, num_steps - 1, COUNTED_STEPS).astype(int).tolist())
    worst: list[MicroBatch] = []
    counted: list[Step] = []
    run = itertools.islice(plan.steps(), num_steps)
    for _, window in itertools.groupby(run, lambda planned: planned.at.window):
        own = list(window)
        worst = _heaviest(plan, [*worst, *(micro for planned in own for micro in planned.step)])
        counted += [planned.step for planned in own if planned.at.global_step in chosen]
        if progress is not None:
            progress(own[-1].next.global_step, num_steps)
    return Workload(
        f"plan {plan.plan_id}: all micro-batches of its {num_steps} steps looked at, "
        f"{len(counted)} steps counted",
        tuple(sorted({_shapes(plan, micro, size) for micro in worst})),
        tuple(_shared(plan, step, size, world_size) for step in counted),
    )


def _heaviest(plan: Plan, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Those with most of each aspect.

    Memory grows with each of them, at prices that depend on the model. What is worst at any prices
    is near one of these.
    """
    per_frame, rows = plan.policy.tokens_per_frame, np.concatenate([m.rows for m in batches])
    sizes = np.array([len(micro.rows) for micro in batches])
    starts = np.cumsum(sizes) - sizes
    lengths, frames = plan.rows.sizes(rows, per_frame)
    learned = plan.rows.num_loss_tokens[rows].astype(np.int64)
    price = max(1.0, per_frame + plan.policy.frame_cost)
    amounts = (
        sizes * np.maximum.reduceat(lengths, starts),
        price * np.add.reduceat(frames, starts),
        price * sizes * np.maximum.reduceat(frames, starts),
        np.add.reduceat(learned, starts),
    )  # in tokens
    return [batches[index] for index in (ASPECTS @ np.stack(amounts)).argmax(axis=1)]


def _shared(
    plan: Plan, step: Step, size: tuple[int, int], world_size: int
) -> tuple[tuple[Shapes, ...], ...]:
    ranks = assign([micro.cost for micro in step], world_size)
    return tuple(tuple(_shapes(plan, step[index], size) for index in own) for own in ranks)


def _shapes(plan: Plan, micro: MicroBatch, size: tuple[int, int]) -> Shapes:
    per_frame = plan.policy.tokens_per_frame
    lengths, frames = plan.rows.sizes(micro.rows, per_frame)
    if plan.policy.loss_on == "preference":  # both answers are read with all frames
        lengths = np.stack([(lengths + 1) // 2, lengths // 2], axis=1).ravel()
        frames = np.repeat(frames // 2, 2)
    # a question that stands first may be as long as the sample
    first = plan.policy.question_first_frac > 0
    reach = lengths if first else np.minimum(lengths, frames * per_frame + HEADER)
    return Shapes(
        lengths=tuple(lengths.tolist()),
        prefixes=tuple(np.where(frames * per_frame > 0, reach, 0).tolist()),
        frames=tuple(frames.tolist()),
        num_loss_tokens=int(plan.rows.num_loss_tokens[micro.rows].sum()),
        frame_size=size,
    )


def batch_of(
    shapes: Shapes, tokens_per_frame: int, latent_shape: tuple[int, int, int] | None = None
) -> Batch:
    """A batch of these shapes; what is in it means nothing.

    Args:
        latent_shape: (C, h, w) of latents that samples bring; None: they bring none.
    """
    num_frames = max(1, shapes.num_frames)
    ids, labels, left = [], [], shapes.num_loss_tokens
    for length, prefix, frames in zip(*shapes[:3], strict=True):
        placed = frames * tokens_per_frame
        ids.append([0] * (prefix - placed) + [1] * placed + [0] * (length - prefix))
        learned = min(left, length - 1)
        left -= learned
        labels.append([IGNORE_INDEX] * (length - learned) + [0] * learned)
    return build_batch(
        frames=torch.zeros((num_frames, 3, *shapes.frame_size), dtype=torch.uint8),
        frame_counts=shapes.frames,
        input_ids=ids,
        labels=labels,
        image_token_id=1,
        tokens_per_frame=tokens_per_frame,
        keys=[str(index) for index in range(len(ids))],
        kind="video" if shapes.num_frames else "text",
        latents=latent_shape and torch.zeros((num_frames, *latent_shape), dtype=torch.float16),
    )
