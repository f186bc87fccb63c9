"""From a recipe and its manifests to what a plan is made of, and a plan in plain words.

Not here: the plan itself (``vlm.data.plan.plan``), which knows neither recipes nor manifests.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vlm.config import DataConfig, Recipe, SourceConfig
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import MicroBatch, Plan, Step, assign, step_hash, summary
from vlm.data.plan.policy import KINDS, Policy, Rows, SourcePolicy
from vlm.data.plan.position import Position
from vlm.data.storage import remote
from vlm.errors import ConfigError, DataError


def open_plan(recipe: Recipe, *, training: bool = True, once: bool = False) -> tuple[Catalog, Plan]:
    """The samples of a recipe and the plan over them.

    Args:
        once: every sample with frames comes once an epoch, whatever the mixture.

    Raises:
        DataError: a manifest is missing or damaged, a sample has no token that is learned, or
            the samples fit no plan.
        ConfigError: the recipe asks for what its samples cannot give.
    """
    data = recipe.data if training else _held_out(recipe.data)
    if once:
        data = data.model_copy(update={"train": tuple(map(_once, data.train)), "weights_at": {}})
    opened = catalog.load([(one.name, one.manifest, one.image_frames) for one in data.train])
    policy = policy_from_recipe(recipe.model_copy(update={"data": data}))
    fingerprints = [source.manifest.fingerprint for source in opened.sources]
    rows = rows_from_catalog(opened, data.loss_on, data.max_text_tokens)
    _check_learned(rows, opened, data.loss_on)
    return opened, Plan(rows, policy, fingerprints)


def _check_learned(rows: Rows, catalog: Catalog, loss_on: str) -> None:
    silent = np.flatnonzero(rows.num_loss_tokens == 0)
    if len(silent):
        raise DataError(
            f"{len(silent)} of {len(rows)} samples have no learned token (data.loss_on is "
            f"{loss_on}), the first: {catalog.where(int(silent[0]))}; a batch of them teaches "
            "nothing: look at them with tools/show_samples.py, and mend or remove them"
        )


def _held_out(data: DataConfig) -> DataConfig:
    """Text-only samples teach; what is measured is how videos are seen, each once."""
    changes = {
        "train": (data.eval,),
        "text_frac": 0.0,
        "weights_at": {},
        "question_first_frac": float(data.orders[0] == "question_first"),
    }
    return data.model_copy(update=changes)


def _once(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"weight": None, "repeat": 1.0, "cap": None})


def policy_from_recipe(recipe: Recipe) -> Policy:
    if recipe.seed >= 1 << 64:
        raise ConfigError(f"seed={recipe.seed}: expected at most 2**64 - 1; take a smaller one")
    data = recipe.data
    return Policy(
        seed=recipe.seed,
        batching=data.batching,
        micro_batches=data.micro_batches,
        budget=data.budget,
        frame_cost=data.frame_cost,
        tokens_per_frame=recipe.model.connector.tokens_per_frame,
        text_frac=data.text_frac,
        window=data.window,
        loss_on=data.loss_on,
        sources=tuple(SourcePolicy(**one.model_dump(exclude={"manifest"})) for one in data.train),
        weight_by=data.weight_by,
        weights_at=tuple(_weights_at(data)),
        question_first_frac=data.question_first_frac,
        max_text_tokens=data.max_text_tokens,
    )


def _weights_at(data: DataConfig) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Each change with the weights of all sources, in the order of steps."""
    now = {one.name: one.weight for one in data.train if one.weight is not None}
    for step in sorted(data.weights_at):
        now |= data.weights_at[step]
        yield step, tuple(now.values())


def rows_from_catalog(
    catalog: Catalog,
    loss_on: Literal["answers", "all", "preference"],
    max_text_tokens: int | None = None,
) -> Rows:
    answers_only, num_tokens = loss_on != "all", catalog.num_tokens
    branches = 2 if loss_on == "preference" else 1
    if max_text_tokens is not None:
        num_tokens = np.minimum(num_tokens, branches * max_text_tokens)
    frames = _frames_shown(catalog)
    return Rows(
        num_frames=frames if branches == 1 else frames.astype(np.uint32) * branches,
        num_tokens=num_tokens,
        kind=catalog.kind,
        shard=catalog.shard,
        num_loss_tokens=catalog.num_answer_tokens if answers_only else catalog.num_tokens,
        first_rows=catalog.first_rows,
    )


def _frames_shown(catalog: Catalog) -> np.ndarray:
    """(n,) frames of each row after images are repeated; the catalog's own where none are."""
    frames = catalog.num_frames
    if all(source.image_frames == 1 for source in catalog.sources):
        return frames
    repeats = [source.image_frames for source in catalog.sources]
    each = np.repeat(np.array(repeats, frames.dtype), np.diff(catalog.first_rows))
    return np.where(catalog.kind == KINDS.index("image"), frames * each, frames)


def describe(plan: Plan, catalog: Catalog, world_size: int, num_steps: int) -> dict[str, Any]:
    """The first steps of a plan: what each rank would run, how full and even that is, and how much
    of it comes from where."""
    steps = [planned.step for planned in itertools.islice(plan.steps(), num_steps)]
    found = summary(steps, plan.policy, world_size)
    return {
        "plan_id": plan.plan_id,
        "steps": [
            {
                "hash": step_hash(catalog.keys(np.concatenate([batch.rows for batch in step]))),
                "micro_batches": list(_describe_step(step, world_size)),
            }
            for step in steps
        ],
        "fill_frac": found.fill_frac,
        "balance": found.balance,
        "text_frac": found.text_frac,
        "sources": list(_describe_sources(plan, catalog, steps)),
    }


def _describe_sources(plan: Plan, catalog: Catalog, steps: list[Step]) -> Iterator[dict[str, Any]]:
    rows = np.concatenate([batch.rows for step in steps for batch in step])
    lengths, frames = plan.rows.sizes(rows, plan.policy.tokens_per_frame)
    index = np.searchsorted(catalog.first_rows, rows, "right") - 1
    for k, source in enumerate(catalog.sources):
        own = index == k
        yield {
            "name": source.name,
            "num_samples": int(own.sum()),
            "num_frames": int(frames[own].sum()),
            "num_tokens": int(lengths[own].sum()),
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


def explain(
    catalog: Catalog, plan: Plan, position: Position, rank: int, world_size: int
) -> dict[str, Any]:
    """The samples that a rank trains on in one step, from the plan alone.

    Raises:
        ConfigError: no such rank, or a world size that M is no multiple of.
    """
    planned = next(plan.steps(position))
    ranks = assign([batch.cost for batch in planned.step], world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank}: expected 0 to {world_size - 1} at world size {world_size}")
    return {
        "plan_id": plan.plan_id,
        **dataclasses.asdict(position),
        "epoch": planned.epoch,
        "micro_batches": [
            {
                "index": index,
                "kind": planned.step[index].kind,
                "cost": planned.step[index].cost,
                "samples": list(_describe_samples(catalog, plan, planned.step[index])),
            }
            for index in ranks[rank]
        ],
    }


def _describe_samples(catalog: Catalog, plan: Plan, batch: MicroBatch) -> Iterator[dict[str, Any]]:
    lengths, frames = plan.rows.sizes(batch.rows, plan.policy.tokens_per_frame)
    columns = (batch.rows, batch.epochs, lengths, frames)
    for row, shown, length, num_frames in zip(*(c.tolist() for c in columns), strict=True):
        found, own = catalog.locate(row)
        yield {
            "row": row,
            "shard": remote.display(catalog.shards[int(catalog.shard[row])].location),
            "key": catalog.key(row),
            "offset": int(found.offset[own]),
            "kind": KINDS[int(catalog.kind[row])],
            "source": catalog.source(row).name,
            "num_frames": num_frames,
            "num_tokens": length,
            "times_shown": shown,
        }
