"""Where the loader's time goes: CPU per frame, from bare decoding on, one piece more at a time.

    python -m bench.loader_pieces --data /tmp/clips --threads 1 2

The folder is that of bench/loader.py, and made if it is not there. Every line does what the line
above it does, and one thing more, sample by sample; the last is the loader itself, which does each
thing for several samples at a time, and joins batches. CPU seconds of all threads, the median of
rounds in which the pieces take turns.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from rich.console import Console
from rich.table import Table

from bench.loader_data import IMAGE_TOKEN, MAX_FRAMES, SIZE, Data, ready
from bench.loader_rivals import open_saccade
from bench.loader_run import Endless
from vlm.data.format import decode, layout, shards
from vlm.data.load.reader import Reader
from vlm.data.manifest.manifest import Manifest
from vlm.data.plan import catalog
from vlm.data.text import chat, encode


class Piece(NamedTuple):
    name: str
    #: reads one row into (T, H, W, 3)
    work: Callable[[int, np.ndarray], object]


def pieces(data: Data, found: catalog.Catalog, rows: Sequence[int]) -> list[Piece]:
    manifest = found.sources[0].manifest
    reader = Reader(found)
    buffers = {row: _bytes(manifest, row) for row in rows}
    contents = {row: layout.read_content(shards.read_members(buffers[row], ""), "") for row in rows}
    tokenizer = chat.load_tokenizer(str(data.tokenizer), IMAGE_TOKEN)
    in_cache = np.empty((MAX_FRAMES, SIZE, SIZE, 3), np.uint8)

    def bare(row: int, out: np.ndarray) -> None:
        for jpeg, frame in zip(contents[row].images.values(), out, strict=True):
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=frame)

    def ceiling(row: int, out: np.ndarray) -> None:
        bare(row, in_cache[: len(out)])

    def checked(row: int, out: np.ndarray) -> None:
        decode.decode_frames(contents[row], out, manifest.sampling, "")

    def parsed(row: int, out: np.ndarray) -> None:
        content = layout.read_content(shards.read_members(buffers[row], ""), "")
        decode.decode_frames(content, out, manifest.sampling, "")

    def tokenized(row: int, out: np.ndarray) -> None:
        encode.encode_sample(tokenizer, reader.read_into(row, out), IMAGE_TOKEN)

    return [
        Piece("decode into the cache", ceiling),
        Piece("decode into memory", bare),
        Piece("check images", checked),
        Piece("parse tar and JSON", parsed),
        Piece("read and hash", reader.read_into),
        Piece("tokenize", tokenized),
    ]


def _bytes(manifest: Manifest, row: int) -> bytes:
    path = manifest.shards[manifest.shard[row]].path
    with shards.open_shard(path) as shard:
        return bytes(shard.read(int(manifest.offset[row]), int(manifest.length[row])))


def measure(piece: Piece, rows: Sequence[int], counts: np.ndarray, threads: int) -> float:
    """CPU microseconds a frame."""
    ends = np.cumsum(counts[rows]).tolist()
    slab = np.empty((ends[-1], SIZE, SIZE, 3), np.uint8)
    slab[:] = 0  # fresh pages are not what is measured
    places = [slab[end - int(counts[row]) : end] for row, end in zip(rows, ends, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        started = time.process_time()
        list(pool.map(piece.work, rows, places))
        return (time.process_time() - started) / len(slab) * 1e6


def measure_loader(data: Data, threads: int, num_frames: int) -> float:
    """CPU microseconds a frame, once queues are full."""
    source = Endless(lambda state: open_saccade(data, threads, state))
    source.take(2 * num_frames)
    started = time.process_time()
    taken = source.take(4 * num_frames)
    used_s = time.process_time() - started
    source.close()
    return used_s / taken.num_frames * 1e6


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder; made if it is not there")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=48)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = ready(args.data)
    found = catalog.load([("bench", data.manifest, 1)])
    rows = np.random.default_rng(0).permutation(found.num_samples)[: args.samples].tolist()
    num_frames = int(found.num_frames[rows].sum())
    todo = pieces(data, found, rows)
    table = Table("piece", *(f"{n} threads: us a frame" for n in args.threads), "of ceiling")
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for threads in args.threads:
            for piece in todo:
                times[piece.name, threads].append(measure(piece, rows, found.num_frames, threads))
            times["loader", threads].append(measure_loader(data, threads, num_frames))
    for name in [piece.name for piece in todo] + ["loader"]:
        medians = [statistics.median(times[name, n]) for n in args.threads]
        tops = [statistics.median(times[todo[0].name, n]) for n in args.threads]
        shares = " ".join(f"{top / own:.3f}" for own, top in zip(medians, tops, strict=True))
        table.add_row(name, *(f"{value:.1f}" for value in medians), shares)
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
