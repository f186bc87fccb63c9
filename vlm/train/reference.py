"""What the model says of both answers of every pair before it is trained: DPO's reference.

1. Before the first step every pair is read once, through the engine, each rank its share.
2. The summed log-probabilities lie in ``reference.safetensors`` of the run folder, so that a run
   that goes on need not keep, or load, the model it began with.
3. The loader hands them to the loss with each pair.

Not here: the loss (``vlm.models.preference``).
"""

import itertools
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlm import dist
from vlm.ckpt import tensors
from vlm.ckpt.files import TEMPORARY
from vlm.ckpt.keep import finished_in
from vlm.config import Recipe
from vlm.data.plan.plan import Position
from vlm.engine.modes import only_mode
from vlm.engine.setup import Machine
from vlm.engine.transfer import on_device
from vlm.errors import CheckpointError
from vlm.models.preference import answer_log_probs
from vlm.train import data
from vlm.train.data import DataSource

log = logging.getLogger(__name__)

FILE = "reference.safetensors"
#: by split: (rows of the catalog, 2); nan where a sample is bad or has no frames
References = dict[str, np.ndarray]


def with_references(
    engine: Any, recipe: Recipe, machine: Machine, tokenizer: Any, identity: dict[str, Any]
) -> References:
    """Those of the run folder, measured first if this is the beginning. All ranks together.

    Args:
        identity: what they depend on: model, weights to start from, samples.

    Raises:
        CheckpointError: the run has begun, but they are gone, or of another model or other samples.
    """
    path = recipe.output_dir / FILE
    known: Any = None
    if dist.is_main():
        has_begun = bool(finished_in(recipe.output_dir / "checkpoints"))
        known = _load(path, identity, must=has_begun)
    known = dist.broadcast_object(known)
    if known is not None:
        return known
    log.info("measuring what the model says of all pairs before it is trained")
    found: References = {}
    for split in ("train", "eval"):
        source = data.open_source(recipe, tokenizer, training=split == "train", once=True)
        found[split] = _measure(engine, recipe, machine, source)
    if dist.is_main():
        _save(path, found, identity)
    return found


@torch.no_grad()
def _measure(engine: Any, recipe: Recipe, machine: Machine, source: DataSource) -> np.ndarray:
    """(rows, 2); every rank runs as many micro-batches."""
    mode = only_mode(recipe)
    options = {} if mode is None else {"mode": mode}
    own: list[tuple[np.ndarray, np.ndarray]] = []
    engine.eval()
    rank, world_size = machine.rank, machine.world_size
    with closing(data.steps(source, recipe, rank, world_size, Position())) as steps:
        for loaded in itertools.takewhile(lambda step: step.epoch == 0, steps):
            for batch in on_device(loaded.batches, engine.device):
                losses = engine(batch, **options).token_losses.double()
                pairs = answer_log_probs(losses, batch).view(-1, 2)
                assert batch.pair_rows is not None
                own.append((batch.pair_rows.cpu().numpy(), pairs.float().cpu().numpy()))
    engine.train()
    table = np.full((source.catalog.num_samples, 2), np.nan, np.float32)
    for rows, values in itertools.chain.from_iterable(dist.gather_objects(own)):
        table[rows] = values
    return table


def _load(path: Path, identity: dict[str, Any], must: bool) -> References | None:
    try:
        with safe_open(path, framework="np") as file:
            said = (file.metadata() or {}).get("identity", "")
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        if must:
            raise CheckpointError(
                f"{path}: {error}; without what the model said before training, the run cannot go "
                "on: bring the file back, or choose another output_dir"
            ) from None
        return None
    if said == _text(identity):
        return found
    if must:
        raise CheckpointError(
            f"{path}: measured with another model or on other samples than the recipe's; choose "
            "another output_dir"
        )
    return None


def _save(path: Path, found: References, identity: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    arrays = {name: torch.from_numpy(array) for name, array in found.items()}
    try:
        tensors.write(temporary, arrays, {"identity": _text(identity)})
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; free space, or mend the folder") from None


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
