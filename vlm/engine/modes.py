"""Which way a global step goes through the model, the same on all ranks and after a resume.

Ranks that went different ways would average the gradients of different parameters.
"""

from typing import Any

import numpy as np

from vlm.config import Recipe
from vlm.errors import ConfigError

#: keeps these draws apart from all others that start from the recipe's seed
STREAM = 0x6D6F6465
#: as at inference
AUTOREGRESSIVE = "autoregressive"
#: what all evaluations measure
LOSS = "eval_loss"


def forward_mode(recipe: Recipe, step: int) -> str | None:
    """The forward mode of a global step, drawn by ``train.modes``; None: the model's own."""
    shares = recipe.train.modes
    if not shares:
        return None
    drawn = np.random.default_rng([recipe.seed, STREAM, step]).random() * sum(shares.values())
    edges = np.cumsum(list(shares.values()))
    index = min(int(np.searchsorted(edges, drawn, side="right")), len(edges) - 1)
    return list(shares)[index]


def only_mode(recipe: Recipe) -> str | None:
    """The one mode in which a run trains, and is judged; None: the model's own, or several."""
    names = list(recipe.train.modes)
    return names[0] if len(names) == 1 else None


def check_modes(model: Any, recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: the model has no such mode, or none that it could learn in, or an evaluation
            would not measure what the best checkpoint goes by.
    """
    if unknown := sorted(set(recipe.train.modes) - set(model.train_modes)):
        raise ConfigError(
            f"train.modes: found {', '.join(unknown)}, expected of {', '.join(model.train_modes)}"
        )
    config, family = recipe.train, recipe.model.family
    if config.eval_autoregressive and AUTOREGRESSIVE not in model.modes:
        raise ConfigError(
            f"train.eval_autoregressive: family {family} has no such mode, found "
            f"{', '.join(model.modes)}; leave it out"
        )
    mode = only_mode(recipe) or model.modes[0]
    parts = model.passes[mode]
    if recipe.data.loss_on == "preference":
        parts = parts[:1]  # pairs are compared by the last pass
    parts += (AUTOREGRESSIVE,) if config.eval_autoregressive else ()
    known = [LOSS, *(f"{LOSS}_{part}" for part in parts)]
    if config.best_metric not in known:
        raise ConfigError(
            f"train.best_metric: found {config.best_metric}, expected of {', '.join(known)}: an "
            f"evaluation of family {family} in mode {mode} measures no other"
        )
