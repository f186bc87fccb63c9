"""The part of bench/loader.py that needs no rival: data, this loader's run, the table."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import webdataset
from rich.console import Console

from bench import loader, loader_data, loader_pieces, loader_run
from bench.loader_rivals import CONTESTANTS, Taken


def test_packing_is_undone_by_unpacking() -> None:
    rng = random.Random(0)
    for count in (0, 1, 7):
        jpegs = [rng.randbytes(rng.randrange(200)) for _ in range(count)]
        assert [bytes(one) for one in loader_data.unpack(loader_data.pack(jpegs))] == jpegs


def test_this_loader_beside_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_data, "NUM_PICTURES", 2)
    monkeypatch.setattr(loader_data, "MAX_FRAMES", 4)
    data = loader_data.make(tmp_path / "data", 2, 4)
    frames = {
        key: sum(name.endswith("jpg") for name in sample)
        for sample in webdataset.WebDataset([str(p) for p in data.tars], shardshuffle=False)
        for key in [sample["__key__"]]
    }
    assert len(frames) == 8 and [len(jpegs) for _, jpegs in data.samples()] == list(frames.values())
    for name in ("saccade", "webdataset"):
        source = loader_run.Endless(lambda state, name=name: CONTESTANTS[name].open(data, 1, state))
        assert source.take(1).num_frames >= 1
        assert source.take(3 * sum(frames.values())).num_samples >= 16, "epochs follow each other"
        source.close()
    monkeypatch.setattr(loader_run, "_cpu_s", lambda: float(os.times().user))
    runs = {
        name: loader_run.measure(CONTESTANTS[name], data, 1, 40) for name in ("ceiling", "saccade")
    }
    runs[loader.ONE_CORE] = runs["ceiling"]
    assert all(np.isfinite(one).all() for one in runs.values())
    assert all(one.frames_per_s > one.samples_per_s > 0 for one in runs.values())
    console = Console(width=140)
    with console.capture() as shown:
        console.print(loader.table(1, [runs, runs]))
    assert "saccade" in shown.get()


def test_pieces_add_up_to_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_data, "NUM_PICTURES", 2)
    data = loader_data.make(tmp_path / "data", 1, 4)
    arguments = ["--data", str(data.folder), "--threads", "2", "--rounds", "1", "--samples", "2"]
    assert loader_pieces.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.index("decode into the cache") < shown.index("tokenize") < shown.index("loader  ")


def test_ratios_are_taken_round_by_round() -> None:
    """The machine is twice as slow in the second round: nothing changes."""
    fast = loader_run.Run(0.1, 0.2, 10.0, 100.0, 1.0, 50.0)
    ceiling = [fast, fast._replace(frames_per_s=50.0)]
    own = [one._replace(frames_per_s=0.9 * one.frames_per_s) for one in ceiling]
    single = [one._replace(frames_per_s=0.625 * one.frames_per_s) for one in ceiling]
    rounds = [
        {"ceiling": top, "saccade": one, loader.ONE_CORE: alone}
        for top, one, alone in zip(ceiling, own, single, strict=True)
    ]
    cells = [list(column.cells) for column in loader.table(2, rounds).columns]
    assert [column[0] for column in cells][:2] == ["ceiling", "10"]
    assert cells[4:6] == [["0.800", "0.720"], ["1.000", "0.900"]]


def test_an_absent_rival_is_named() -> None:
    assert loader.missing("no_such_package.part") == "no_such_package.part is not installed"
    assert loader.missing("vlm") == ""


def test_epochs_are_counted_once() -> None:
    class Short:
        def __init__(self) -> None:
            self.opened = 0

        def __call__(self, state: object) -> loader_run.Stream:
            self.opened += 1
            return loader_run.Stream(iter([Taken(1, 3), Taken(1, 2)]), lambda: None)

    start = Short()
    assert loader_run.Endless(start).take(11) == Taken(5, 13)
    assert start.opened == 3
