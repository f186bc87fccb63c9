"""What a model expects of the next frames, as pictures: family ``foveated_latent`` alone.

A strip for each held-out sample, three rows: its frames, what the autoencoder keeps of them, and
what the model expected where each stands, decoded. Beside them the square errors of the latents,
the model's and that of expecting the frame before again. Not here: losses in training.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.autoencoder import Autoencoder, autoencoder
from vlm.ckpt.files import replace_text
from vlm.errors import ConfigError
from vlm.evaluate.judge import held_out, open_run
from vlm.models.latent import FoveatedLatentModel, Mode
from vlm.train.held_out_looks import whole

log = logging.getLogger(__name__)

FOLDER = "next_frames"
#: pixels between pictures
GAP = 2


@torch.no_grad()
def draw(run_dir: Path, max_samples: int, decoder: str | None, mode: Mode) -> Path:
    """Writes ``next_frames/NNN.png`` and ``next_frames.json`` into the run's folder.

    Args:
        decoder: folder or id of the AutoencoderKL; None: the one that the model names.
        mode: in which the model reads a sample.

    Returns:
        The folder.

    Raises:
        ConfigError: the model predicts no latents, or nobody names an autoencoder.
        CheckpointError, DataError: as ``judge.open_run`` and ``judge.held_out``.
    """
    recipe, checkpoint, model = open_run(run_dir)
    if not isinstance(model, FoveatedLatentModel):
        raise ConfigError(
            f"run {run_dir}: family {recipe.model.family} predicts no frames; expected a run of "
            "foveated_latent"
        )
    name = decoder or model.connector.autoencoder
    if name is None:
        raise ConfigError(
            f"run {run_dir}: its latents were stored, so it names no autoencoder; name the one "
            "that made them with --decoder"
        )
    held, decodes = held_out(recipe, max_samples), autoencoder(name)
    folder = run_dir / FOLDER
    if folder.exists():  # what is drawn is all there is, and of one model
        shutil.rmtree(folder)
    folder.mkdir()
    found = []
    for index, (key, sample) in enumerate(zip(held.keys, held.samples, strict=True)):
        batch = whole(held.collator, key, sample, question_first=False).to(model.device)
        latents, expected = model.latents(batch), model.predictions(batch, mode)
        image = _strip(batch.frames.cpu(), latents, expected, decodes)
        path = folder / f"{index:03}.png"
        image.save(path)
        found.append({"key": key, "file": path.name, **errors(latents, expected)})
    about = {"checkpoint": str(checkpoint), "mode": mode, "samples": found}
    replace_text(run_dir / f"{FOLDER}.json", json.dumps(about, indent=1))
    return folder


def errors(latents: Tensor, expected: Tensor) -> dict[str, Any]:
    """Mean square errors of each frame (T,), and of expecting the frame before, from the second."""
    frame = (expected - latents).square().flatten(1).mean(1).tolist()
    copied = (latents[1:] - latents[:-1]).square().flatten(1).mean(1).tolist()
    return {"error": frame, "error_of_copying": copied}


def _strip(frames: Tensor, latents: Tensor, expected: Tensor, decoder: Autoencoder) -> Image.Image:
    """Rows of pictures, all of the size that is decoded."""
    rows = [decoder.decode(latents).cpu(), decoder.decode(expected).cpu()]
    size = rows[0].shape[-2:]
    real = F.interpolate(frames.float(), size, mode="bilinear", antialias=True)
    rows.insert(0, real.round().clamp(0, 255).byte())
    padded = [F.pad(row, (GAP, GAP, GAP, GAP)) for row in rows]
    # (rows, T, 3, H, W) -> (rows, H, T, W, 3)
    canvas = torch.stack(padded).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(np.ascontiguousarray(canvas.numpy()))
