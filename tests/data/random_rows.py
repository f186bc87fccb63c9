"""Random planning columns and a policy, for tests of the plan and its parts."""

from typing import Any

import numpy as np

from vlm.data.plan.policy import Policy, Rows


def make_rows(
    num_rows: int, seed: int = 0, text_frac: float = 0.2, image_frac: float = 0.1, shards: int = 10
) -> Rows:
    """Frames log-uniform over 1 to 64, text log-normal around 60 tokens, shards of any size."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, num_rows, p=[text_frac, image_frac, 1 - text_frac - image_frac])
    frames = np.exp(rng.uniform(0, np.log(65), num_rows)).astype(np.int64).clip(1, 64)
    frames = np.where(kind == 0, 0, np.where(kind == 1, 1, frames))
    tokens = np.exp(rng.normal(np.log(60), 0.6, num_rows)).astype(np.int64).clip(1, 500)
    return Rows(
        num_frames=frames.astype(np.uint32),
        num_tokens=tokens.astype(np.uint32),
        kind=kind.astype(np.uint32),
        shard=np.sort(rng.integers(0, shards, num_rows)).astype(np.uint32),
        num_loss_tokens=(tokens // 2).astype(np.uint32),
        first_rows=np.array([0, num_rows]),
    )


def make_policy(**changes: Any) -> Policy:
    values: dict[str, Any] = {
        "seed": 1,
        "batching": "bucketed",
        "micro_batches": 8,
        "budget": 4096,
        "frame_cost": 16.0,
        "tokens_per_frame": 1,
        "text_frac": 0.2,
        "window": 500,
        "loss_on": "answers",
    }
    return Policy(**{**values, **changes})
