"""What a run will have to compute and hold, before it starts: micro-batches of its plan, as shapes.

Without manifests a stated worst case stands in for a plan: micro-batches full of the longest
videos that a sample may hold. Not here: memory and speed of them (``vlm.train.estimate``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm.batch import IGNORE_INDEX, Batch, build_batch
from vlm.config import Recipe
from vlm.data.load.collate import frame_size
from vlm.data.plan import planning
from vlm.data.plan.plan import MicroBatch, Plan, Step, assign
from vlm.models.flop_work import Shapes

#: steps of the plan whose operations are counted
COUNTED_STEPS = 64
#: the longest video and a long conversation, where there is no manifest
ASSUMED_FRAMES, ASSUMED_TEXT = 64, 256
#: tokens of a conversation before its first frame
HEADER = 4


@dataclass(frozen=True)
class Workload:
    #: where the numbers are from
    source: str
    #: micro-batches that ask for most memory in one respect or another
    worst: tuple[Shapes, ...]
    #: some global steps, each as its ranks share it
    steps: tuple[tuple[tuple[Shapes, ...], ...], ...]


def of_recipe(recipe: Recipe, assumed_size: tuple[int, int], world_size: int) -> Workload:
    """
    Args:
        assumed_size: height and width of frames where no manifest says it, px.

    Raises:
        DataError: some of the manifests are missing or damaged.
        ConfigError: the ranks cannot share a step equally.
    """
    if any(source.manifest.is_file() for source in recipe.data.train):
        return _planned(recipe, world_size)
    shapes = _assumed(recipe, assumed_size)
    per_rank = recipe.data.micro_batches // world_size
    return Workload(
        f"assumed, as no manifest is there: micro-batches of {len(shapes.lengths)} samples with "
        f"{ASSUMED_FRAMES} frames of {assumed_size[0]} x {assumed_size[1]} px and {ASSUMED_TEXT} "
        "text tokens, all learned",
        (shapes,),
        (((shapes,) * per_rank,) * world_size,),
    )


def _assumed(recipe: Recipe, size: tuple[int, int]) -> Shapes:
    placeholders = ASSUMED_FRAMES * recipe.model.connector.tokens_per_frame
    length = placeholders + ASSUMED_TEXT
    cost = length + ASSUMED_FRAMES * recipe.data.frame_cost
    num = max(1, int(recipe.data.budget // cost))
    return Shapes(
        lengths=(length,) * num,
        prefixes=(placeholders + HEADER,) * num,
        num_frames=num * ASSUMED_FRAMES,
        num_loss_tokens=num * ASSUMED_TEXT,
        frame_size=size,
    )


def _planned(recipe: Recipe, world_size: int) -> Workload:
    catalog, plan = planning.open_plan(recipe)
    size, steps = frame_size(catalog), plan.window(0)[: recipe.train.steps]
    batches = [_shapes(plan, micro, size) for step in steps for micro in step]
    chosen = np.unique(np.linspace(0, len(steps) - 1, COUNTED_STEPS).astype(int))
    return Workload(
        f"plan {plan.plan_id}: {len(steps)} steps of its first window, {len(chosen)} of them "
        "counted",
        tuple(_worst(batches)),
        tuple(_shared(plan, steps[index], size, world_size) for index in chosen),
    )


def _worst(batches: Sequence[Shapes]) -> Iterator[Shapes]:
    """The one with most padded tokens, with most frames, with most to score."""
    found = {
        max(batches, key=lambda s: (len(s.lengths) * max(s.lengths), s.num_frames)),
        max(batches, key=lambda s: (s.num_frames, sum(s.lengths))),
        max(batches, key=lambda s: (s.num_loss_tokens, sum(s.lengths))),
    }
    yield from sorted(found)


def _shared(
    plan: Plan, step: Step, size: tuple[int, int], world_size: int
) -> tuple[tuple[Shapes, ...], ...]:
    ranks = assign([micro.cost for micro in step], world_size)
    return tuple(tuple(_shapes(plan, step[index], size) for index in own) for own in ranks)


def _shapes(plan: Plan, micro: MicroBatch, size: tuple[int, int]) -> Shapes:
    per_frame = plan.policy.tokens_per_frame
    lengths, frames = plan.rows.sizes(micro.rows, per_frame)
    # a question that stands first may be as long as the sample
    first = plan.policy.question_first_frac > 0
    reach = lengths if first else np.minimum(lengths, frames * per_frame + HEADER)
    return Shapes(
        lengths=tuple(lengths.tolist()),
        prefixes=tuple(np.where(frames * per_frame > 0, reach, 0).tolist()),
        num_frames=int(frames.sum()),
        num_loss_tokens=int(plan.rows.num_loss_tokens[micro.rows].sum()),
        frame_size=size,
    )


def batch_of(shapes: Shapes, tokens_per_frame: int) -> Batch:
    """A batch of these shapes; what is in it means nothing."""
    owned, left = _frames_of(shapes, tokens_per_frame), shapes.num_loss_tokens
    ids, labels = [], []
    for length, prefix, frames in zip(shapes.lengths, shapes.prefixes, owned, strict=True):
        placed = frames * tokens_per_frame
        ids.append([0] * (prefix - placed) + [1] * placed + [0] * (length - prefix))
        learned = min(left, length - 1)
        left -= learned
        labels.append([IGNORE_INDEX] * (length - learned) + [0] * learned)
    return build_batch(
        frames=torch.zeros((max(1, shapes.num_frames), 3, *shapes.frame_size), dtype=torch.uint8),
        frame_counts=owned,
        input_ids=ids,
        labels=labels,
        image_token_id=1,
        tokens_per_frame=tokens_per_frame,
        keys=[str(index) for index in range(len(ids))],
        kind="video" if tokens_per_frame and shapes.num_frames else "text",
    )


def _frames_of(shapes: Shapes, tokens_per_frame: int) -> list[int]:
    """Frames dealt to samples: their prefixes bound them, and where they lie changes no size."""
    left, owned = shapes.num_frames, []
    for prefix in shapes.prefixes:
        owned.append(min(left, prefix // tokens_per_frame) if tokens_per_frame else left)
        left -= owned[-1]
    return owned
