"""What a manifest of many samples costs a rank: to load, to open its plan, to seek, in memory.

    python bench/manifest.py --samples 1000000 10000000

Each size is written to a temporary file (synthetic samples of `bench/plan.py`, random hashes) and
then loaded by a process of its own, as every rank does. Times are CPU seconds of one core, memory
is the peak of that process beyond what its imports take. Not here: reading shards.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from plan import SAMPLES_PER_SHARD, SEEK_STEP, make_policy, synthetic_rows

from vlm.data.manifest import manifest, manifest_file
from vlm.data.plan.catalog import Source, join
from vlm.data.plan.plan import Plan
from vlm.data.plan.planning import rows_from_catalog
from vlm.data.plan.position import Position

SOURCE = "synthetic"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and weigh a large manifest.")
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    args = parser.parse_args()
    sys.stdout.write("   samples  B/sample  load s  open s  seek s  memory GB\n")
    for num_samples in args.samples:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.parquet"
            write(path, num_samples)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures = pool.apply(load, (path,))
            size = path.stat().st_size / num_samples
        line = f"{num_samples:10} {size:9.1f} {figures[0]:7.2f} {figures[1]:7.2f} {figures[2]:7.2f}"
        sys.stdout.write(f"{line} {figures[3]:10.2f}\n")
        sys.stdout.flush()


def write(path: Path, num_samples: int) -> None:
    rows = synthetic_rows(num_samples, seed=0)
    rng = np.random.default_rng(1)
    shards = []
    with manifest_file.open_writer(path) as writer:
        for shard, start in enumerate(range(0, num_samples, SAMPLES_PER_SHARD)):
            own = slice(start, min(start + SAMPLES_PER_SHARD, num_samples))
            frames, tokens = rows.num_frames[own], rows.num_tokens[own]
            lengths = 1536 + 13_312 * frames.astype(np.int64)
            columns = {
                "key": [f"{row:08d}" for row in range(own.start, own.stop)],
                "shard": np.zeros(len(frames)),
                "offset": np.cumsum(lengths) - lengths,
                "length": lengths,
                "kind": rows.kind[own],
                "num_frames": frames,
                "height": np.where(frames, 224, 0),
                "width": np.where(frames, 224, 0),
                "num_tokens": tokens,
                "num_answer_tokens": rows.num_loss_tokens[own],
                "source": [SOURCE] * len(frames),
                "content_hash": [rng.bytes(16) for _ in frames],
            }
            schema = manifest_file.ARROW_SCHEMA
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
            writer.add(shard, pa.RecordBatch.from_arrays(arrays, schema=schema))
            info = {"path": f"{shard:05d}.tar", "bytes": int(lengths.sum()) + 1024}
            shards.append(
                manifest_file.Shard(**info, sha256=rng.bytes(32).hex(), num_samples=len(frames))
            )
        writer.close(
            manifest_file.Header(
                version=manifest_file.VERSION,
                tokenizer=manifest_file.Tokenizer(name="none", sha256="0" * 64),
                vision=manifest_file.Vision(size=None, fps=1.0, max_frames=64),
                shards=shards,
                sources=[manifest_file.Source(name=SOURCE, num_samples=num_samples, licences=[])],
                forms={"caption": num_samples},
                fingerprint="0" * 64,
            )
        )


def load(path: Path) -> tuple[float, float, float, float]:
    """Seconds to load, to open a plan and to seek a step of it; peak gigabytes."""
    before = _peak_gb()
    started = time.process_time()
    catalog = join([Source(SOURCE, manifest.load(path))])
    load_s = time.process_time() - started
    policy = make_policy("bucketed", 64, 16_384)
    fingerprints = [source.manifest.fingerprint for source in catalog.sources]
    started = time.process_time()
    plan = Plan(rows_from_catalog(catalog, "answers"), policy, fingerprints)
    open_s = time.process_time() - started
    position = Position(SEEK_STEP // plan.steps_in_window(0), 0, SEEK_STEP)
    started = time.process_time()
    next(plan.steps(position))
    return load_s, open_s, time.process_time() - started, _peak_gb() - before


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
