"""From a recipe and a manifest to what a plan is made of, and a plan in plain words.

Not here: the plan itself (``vlm.data.plan``), which knows neither recipes nor manifests.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vlm.config import Recipe
from vlm.data.manifest import Manifest
from vlm.data.plan import Plan, Policy, Rows, Step, assign, step_hash, summary
from vlm.errors import ConfigError

#: placeholders of a frame in the language model, by model family
TOKENS_PER_FRAME = {"foveated": 1}


def tokens_per_frame(family: str) -> int:
    if family not in TOKENS_PER_FRAME:
        known = ", ".join(TOKENS_PER_FRAME)
        raise ConfigError(f"model.family={family}: no such family; expected one of {known}")
    return TOKENS_PER_FRAME[family]


def policy_from_recipe(recipe: Recipe, tokens_per_frame: int) -> Policy:
    if recipe.seed >= 1 << 64:
        raise ConfigError(f"seed={recipe.seed}: expected at most 2**64 - 1; take a smaller one")
    data = recipe.data
    return Policy(
        seed=recipe.seed,
        batching=data.batching,
        micro_batches=data.micro_batches,
        budget=data.budget,
        frame_cost=data.frame_cost,
        tokens_per_frame=tokens_per_frame,
        text_frac=data.text_frac,
        window=data.window,
        loss_on=data.loss_on,
    )


def rows_from_manifest(manifest: Manifest, loss_on: Literal["answers", "all"]) -> Rows:
    answers_only = loss_on == "answers"
    return Rows(
        num_frames=manifest.num_frames,
        num_tokens=manifest.num_tokens,
        kind=manifest.kind,
        shard=manifest.shard,
        num_loss_tokens=manifest.num_answer_tokens if answers_only else manifest.num_tokens,
        first_rows=np.array([0, manifest.num_samples]),
    )


def describe(plan: Plan, manifest: Manifest, world_size: int, num_steps: int) -> dict[str, Any]:
    """The first steps of a plan: what each rank would run, and how full and even that is."""
    steps = [planned.step for planned in itertools.islice(plan.steps(), num_steps)]
    found = summary(steps, plan.policy, world_size)
    return {
        "plan_id": plan.plan_id,
        "steps": [
            {
                "hash": step_hash(manifest.keys(np.concatenate([batch.rows for batch in step]))),
                "micro_batches": list(_describe_step(step, world_size)),
            }
            for step in steps
        ],
        "fill_frac": found.fill_frac,
        "balance": found.balance,
        "text_frac": found.text_frac,
    }


def _describe_step(step: Step, world_size: int) -> Iterator[dict[str, Any]]:
    ranks = assign([batch.cost for batch in step], world_size)
    rank_of = {index: rank for rank, own in enumerate(ranks) for index in own}
    for index, batch in enumerate(step):
        yield {
            "rank": rank_of[index],
            "kind": batch.kind,
            "num_samples": len(batch.rows),
            "num_frames": batch.num_frames,
            "num_tokens": batch.num_tokens,
            "cost": batch.cost,
        }
