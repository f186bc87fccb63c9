"""Where the coarse and the fine pass look, frame by frame."""

from typing import NamedTuple

import numpy as np
import torch

from vlm.batch import Batch
from vlm.models.foveated import FoveatedModel


class Attention(NamedTuple):
    """Of each frame (gh, gw): attention to its patches, mean of layers and heads.

    CLS and registers are left out, so a map sums to less than 1.
    """

    #: of the static query
    coarse: list[np.ndarray]
    #: of each frame's own query in the last fine pass
    fine: list[np.ndarray]


@torch.no_grad()
def attention(model: FoveatedModel, batch: Batch) -> Attention:
    assert batch.has_frames, batch.keys
    _, cache = model.vision(batch.frames)
    height, width = model.vision.grid(batch.frames)
    found = []
    for queries in (model.static_queries(batch), model.last_queries(batch, cache)):
        maps = model.vision.attention(model.connector.query_input_proj(queries), cache)
        patches = maps.float().mean(dim=(1, 2))[:, -height * width :]
        found.append(list(patches.view(-1, height, width).cpu().numpy()))
    return Attention(*found)
