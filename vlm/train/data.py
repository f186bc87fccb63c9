"""From a recipe to batches: manifests, tokenizer, plan, and who reads what."""

from collections.abc import Generator, Iterable
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vlm.config import AugmentConfig, Recipe
from vlm.data.load import faults
from vlm.data.load.collate import Collator
from vlm.data.load.loader import LoadedStep, Loader
from vlm.data.plan import plan_index, planning
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan, Position
from vlm.data.text import chat


class DataSource(NamedTuple):
    """Samples and a plan over them."""

    catalog: Catalog
    plan: Plan
    collator: Collator
    #: of pairs of answers, see ``vlm.train.reference``
    references: np.ndarray | None = None


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    return chat.load_tokenizer(recipe.model.tokenizer, recipe.model.image_token)


def open_source(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, training: bool, once: bool = False
) -> DataSource:
    """Opens what a recipe trains on, or is evaluated on: checked against shards and tokenizer.

    Args:
        once: every sample with frames comes once an epoch, whatever the mixture.

    Raises:
        DataError: a shard is gone or has changed, or tokens were counted with another tokenizer.
    """
    catalog, plan = planning.open_plan(recipe, training=training, once=once)
    catalog.check_shards()
    name = recipe.model.tokenizer
    catalog.check_tokenizer(chat.tokenizer_fingerprint(name), name)
    collator = Collator(
        tokenizer=tokenizer,
        image_token=recipe.model.image_token,
        tokens_per_frame=plan.policy.tokens_per_frame,
        loss_on=recipe.data.loss_on,
        augment=recipe.data.augment if training else AugmentConfig(),
        seed=recipe.seed,
        max_text_tokens=recipe.data.max_text_tokens,
        latent_shape=recipe.model.latent_shape,
    )
    return DataSource(catalog, plan, collator)


def steps(
    source: DataSource,
    recipe: Recipe,
    rank: int,
    world_size: int,
    position: Position,
    quarantine: Iterable[int] = (),
) -> Generator[LoadedStep]:
    """A rank's share of each global step from ``position`` on, without end.

    Batches are prepared ahead by threads, which ``close()`` ends.

    Args:
        quarantine: Rows found bad before, of ``LoaderState``.
    """
    plan, folder = source.plan, recipe.output_dir
    loader = Loader(
        source.catalog,
        plan,
        source.collator,
        recipe.data,
        rank=rank,
        world_size=world_size,
        position=position,
        quarantine=quarantine,
        pinned=torch.cuda.is_available(),
        bad_samples=folder / faults.FILE if folder.is_dir() else None,
        references=source.references,
        dpo_beta=recipe.optim.dpo_beta,
    )
    known = len(plan.num_steps)
    with closing(iter(loader)) as loaded_steps:  # type: ignore[type-var]
        for loaded in loaded_steps:
            yield loaded
            if rank == 0 and len(plan.num_steps) > known and folder.is_dir():
                known = len(plan.num_steps)
                plan_index.save(plan, folder)  # so that any step is found without planning
