"""Configs of published models, without their weights, where a recipe names the models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.config import Recipe


def write_configs(recipe: Recipe, configs: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    """Writes the config of each part below ``folder``; overrides that name them there."""
    overrides = []
    for part, found in (("vision", recipe.model.vision), ("language", recipe.model.language)):
        assert found.pretrained is not None
        here = folder / found.pretrained
        here.mkdir(parents=True)
        (here / "config.json").write_text(json.dumps(configs[found.pretrained]))
        overrides.append(f"model.{part}.pretrained={here}")
    return overrides
