"""From a recipe to batches: manifest, tokenizer, plan, and who reads what."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from vlm.config import AugmentConfig, Recipe
from vlm.data import chat, manifest, planning
from vlm.data.loader import Collator, LoadedStep, Loader
from vlm.data.manifest import Manifest
from vlm.data.plan import Plan, Position
from vlm.errors import DataError


class DataSource(NamedTuple):
    """One manifest and its plan."""

    manifest: Manifest
    plan: Plan
    collator: Collator


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    return chat.load_tokenizer(recipe.model.tokenizer, recipe.model.image_token)


def open_source(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, path: Path, *, training: bool
) -> DataSource:
    """Opens a manifest, checks it against its shards and tokenizer, and plans over it.

    Raises:
        DataError: a shard is gone or has changed, or tokens were counted with another tokenizer.
    """
    found = manifest.load(path)
    found.check_shards()
    if found.tokenizer_sha256 != chat.tokenizer_fingerprint(recipe.model.tokenizer):
        raise DataError(
            f"manifest {path}: its tokens were counted with another tokenizer than "
            f"{recipe.model.tokenizer}; build the manifest again with that one"
        )
    tokens_per_frame = planning.tokens_per_frame(recipe.model.family)
    policy = planning.policy_from_recipe(recipe, tokens_per_frame)
    if not training:  # text-only samples teach; what is measured is how videos are seen
        policy = dataclasses.replace(policy, text_frac=0.0)
    rows = planning.rows_from_manifest(found, recipe.data.loss_on)
    collator = Collator(
        tokenizer=tokenizer,
        image_token=recipe.model.image_token,
        tokens_per_frame=tokens_per_frame,
        loss_on=recipe.data.loss_on,
        augment=recipe.data.augment if training else AugmentConfig(),
        seed=recipe.seed,
    )
    return DataSource(found, Plan(rows, policy, found.fingerprint), collator)


def steps(
    source: DataSource, recipe: Recipe, rank: int, world_size: int, position: Position
) -> Generator[LoadedStep]:
    """A rank's share of each global step from ``position`` on, without end.

    Batches are prepared ahead by threads, which ``close()`` ends.
    """
    yield from Loader(
        source.manifest,
        source.plan,
        source.collator,
        recipe.data,
        rank=rank,
        world_size=world_size,
        position=position,
    )
