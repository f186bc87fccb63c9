"""Where the fine pass looks, frame by frame."""

import numpy as np
import torch

from vlm.batch import Batch
from vlm.models.foveated import FoveatedModel


@torch.no_grad()
def fine_attention(model: FoveatedModel, batch: Batch) -> np.ndarray:
    """(F, h, w): attention of each frame's own query to its patches, mean of layers and heads.

    CLS and registers are left out, so a map sums to less than 1.
    """
    assert batch.has_frames, batch.keys
    _, cache = model.vision(batch.frames)
    queries = model.last_queries(batch, cache)
    maps = model.vision.attention(model.connector.query_input_proj(queries), cache)
    height, width = model.vision.grid(batch.frames)
    patches = maps.float().mean(dim=(1, 2))[:, -height * width :]
    return patches.view(-1, height, width).cpu().numpy()
