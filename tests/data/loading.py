"""A loader in a process of its own, to be killed: one line of JSON for each step it loads.

python -m tests.data.loading MANIFEST TOKENIZER THREADS
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.random_rows import make_policy
from vlm.batch import Batch
from vlm.config import AugmentConfig, DataConfig, StorageConfig
from vlm.data.load.loader import Loader
from vlm.data.plan import catalog
from vlm.data.plan.plan import Plan, Position
from vlm.data.plan.planning import rows_from_catalog
from vlm.data.text import chat

MICRO_BATCHES = 8


def open_loader(
    manifest: Path,
    tokenizer: Path,
    *,
    threads: int = 2,
    rank: int = 0,
    world_size: int = 1,
    position: Position | None = None,
    storage: StorageConfig | None = None,
) -> Loader:
    found = catalog.load([("train", manifest, 1)])
    policy = make_policy(
        seed=11,
        batching="packed",
        micro_batches=MICRO_BATCHES,
        budget=60,
        frame_cost=2,
        window=40,
    )
    collator = make_collator(
        chat.load_tokenizer(tokenizer, IMAGE_TOKEN),
        seed=11,
        augment=AugmentConfig(shift_px=2, contrast=0.1),
    )
    config = DataConfig(
        train="unused",
        eval="unused",
        micro_batches=MICRO_BATCHES,
        budget=60,
        decode_threads=threads,
        storage=storage or StorageConfig(),
    )
    plan = Plan(rows_from_catalog(found, "answers"), policy, ["fingerprint"])
    return Loader(
        found, plan, collator, config, rank=rank, world_size=world_size, position=position
    )


def batch_hash(batch: Batch) -> str:
    digest = hashlib.sha256(" ".join(batch.keys).encode())
    for part in (batch.frames, batch.input_ids, batch.labels, batch.cu_frames, batch.cu_seqlens):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def steps(loader: Loader) -> Iterator[dict[str, Any]]:
    """Where the next step lies, and the hashes of this one's micro-batches in no order."""
    with closing(iter(loader)) as found:  # type: ignore[type-var]
        for step in found:
            hashes = sorted(batch_hash(batch) for batch in step.batches)
            yield {"next": dataclasses.asdict(step.next), "hashes": hashes}


if __name__ == "__main__":
    opened = open_loader(Path(sys.argv[1]), Path(sys.argv[2]), threads=int(sys.argv[3]))
    for one in steps(opened):
        sys.stdout.write(json.dumps(one) + "\n")
        sys.stdout.flush()
