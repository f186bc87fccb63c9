"""How far the patches of the next frame follow from those of this one, by a run's frozen tower.

A small convolutional net learns from the run's training clips what a tower will say of each patch
``gap`` frames on; it starts as a copy of what it says now. Its square error on held-out clips,
beside that of copying, says how much there is to be predicted in features, where ``vlm.models.
latent`` asks the same of pixels. Not here: anything that trains the model itself.

Legend: T frames of a clip, D width of the tower, h x w patches, B pairs.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.config import Recipe
from vlm.data.load.reader import Reader
from vlm.data.plan import stream
from vlm.errors import ConfigError, DataError
from vlm.evaluate.judge import open_run
from vlm.models.vision import VisionEncoder
from vlm.train import data

log = logging.getLogger(__name__)

WIDTH = 256
PAIRS = 32
RATE = 1e-3


@dataclass(frozen=True)
class Predicted:
    #: frames between a pair
    gap: int
    #: pairs that were learned from, and judged by
    num_train: int
    num_eval: int
    #: mean square errors on the latter
    error: float
    error_of_copying: float

    @property
    def gain_frac(self) -> float:
        """By how much predicting is better than copying: 0.1 means a tenth less error."""
        if self.error_of_copying == 0:  # clips that rest
            return 0.0
        return 1 - self.error / self.error_of_copying


class Predictor(nn.Module):
    """(B, D, h, w) patches -> the same of the later frame; a copy before it has learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, dim, 3, padding=1)
        )
        last = self.net[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, patches: Tensor) -> Tensor:
        return patches + self.net(patches)


def predict_patches(run_dir: Path, *, gap: int, steps: int, max_clips: int) -> Predicted:
    """
    Raises:
        ConfigError: the run's tower gives no patches to look at.
        DataError: no clip has frames so far apart.
        CheckpointError: as ``judge.open_run``.
    """
    recipe, _, model = open_run(run_dir)
    if recipe.model.family == "blind" or not isinstance(model.vision, VisionEncoder):
        raise ConfigError(
            f"run {run_dir}: family {recipe.model.family} has no DINO tower; expected a run of "
            "foveated, foveated_latent or multi_token"
        )
    before, after = _pairs(model, recipe, gap, max_clips, training=True)
    judged = _pairs(model, recipe, gap, max_clips, training=False)
    predictor = fit(before, after, steps, recipe.seed)
    return Predicted(gap, len(before), len(judged[0]), *errors(predictor, *judged))


def fit(before: Tensor, after: Tensor, steps: int, seed: int) -> Predictor:
    """Learns (N, D, h, w) ``after`` from ``before``."""
    torch.manual_seed(seed)
    predictor = Predictor(before.shape[1]).to(before.device)
    adam = torch.optim.AdamW(predictor.parameters(), lr=RATE)
    for _ in range(steps):
        index = torch.randint(len(before), (PAIRS,), device=before.device)
        adam.zero_grad()
        F.mse_loss(predictor(before[index]), after[index]).backward()
        adam.step()
    return predictor


@torch.no_grad()
def errors(predictor: Predictor, before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean square errors of predicting, and of copying."""
    found = [
        (F.mse_loss(predictor(b), a, reduction="sum"), F.mse_loss(b, a, reduction="sum"))
        for b, a in zip(before.split(PAIRS), after.split(PAIRS), strict=True)
    ]
    own, copied = (float(sum(each)) / after.numel() for each in zip(*found, strict=True))
    return own, copied


@torch.no_grad()
def _pairs(
    model: Any, recipe: Recipe, gap: int, max_clips: int, *, training: bool
) -> tuple[Tensor, Tensor]:
    """(N, D, h, w) patches of frames, and of those ``gap`` frames later."""
    source = data.open_source(recipe, data.load_tokenizer(recipe), training=training)
    rows = np.flatnonzero(source.catalog.num_frames > gap)
    if not len(rows):
        split = "train" if training else "eval"
        raise DataError(f"data.{split}: no clip has more than {gap} frames; expected some")
    order = stream.permutation(stream.philox(recipe.seed, stream.ORDER, 0, 0), len(rows))
    reader, before, after = Reader(source.catalog), [], []
    for row in rows[order][:max_clips].tolist():
        frames = torch.from_numpy(reader.read(row).frames).permute(0, 3, 1, 2).to(model.device)
        patches = model.vision.patches(frames).float()
        before.append(patches[:-gap])
        after.append(patches[gap:])
    reader.close()
    return torch.cat(before), torch.cat(after)


def summary(found: Predicted) -> dict[str, float]:
    return {**asdict(found), "gain_frac": found.gain_frac}
