"""Which way a global step goes through the model, the same on all ranks and after a resume.

Ranks that went different ways would average the gradients of different parameters.
"""

from typing import Any

import numpy as np

from vlm.config import Recipe
from vlm.errors import ConfigError

#: keeps these draws apart from all others that start from the recipe's seed
STREAM = 0x6D6F6465


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
    """The one mode that a recipe names; None: it names none, or several."""
    names = list(recipe.train.modes)
    return names[0] if len(names) == 1 else None


def check_modes(model: Any, recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: the model has no such mode, or none that it could learn in.
    """
    if unknown := sorted(set(recipe.train.modes) - set(model.train_modes)):
        raise ConfigError(
            f"train.modes: found {', '.join(unknown)}, expected of {', '.join(model.train_modes)}"
        )
