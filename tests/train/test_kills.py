"""Killed with SIGKILL wherever it hurts, in every ZeRO stage, and still the same run bit for bit.

Twenty kills take minutes: ``make test-slow``. A few kills in every run of the suite are in
``tests/ckpt/test_load.py`` and ``tests/ckpt/test_save.py``.
"""

import hashlib
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from tests.distributed import RankError, ranks
from tests.train import helpers, runs
from vlm.ckpt import load, save
from vlm.config import Recipe
from vlm.engine import step
from vlm.engine.setup import Machine
from vlm.engine.step import Pending, read, train_step
from vlm.train import loop, validate
from vlm.train.preempt import Preemption

#: what a kill comes before: of which module, which function, at most its how-manieth call
PLACES: dict[str, tuple[Any, str, int]] = {
    "before the first step": (loop, "build_run", 1),
    "while it loads": (load, "load_pieces", 1),
    "in a step": (step, "add", 6),
    "before files are written": (save, "write_pieces", 3),
    "before they are complete": (save, "sync_tree", 4),
    "before latest is moved": (save, "replace_text", 3),
    "before old ones are removed": (save, "prune", 3),
    "in an evaluation": (validate, "eval_step", 3),
}
#: only this rank is there
MAIN = ("before they are complete", "before latest is moved", "before old ones are removed")
KILLS = 5


class Kill(NamedTuple):
    rank: int
    #: of PLACES; None: after ``at`` seconds, wherever that is
    place: str | None
    at: float


def draw(rng: random.Random) -> Kill:
    place = rng.choice([None, None, *PLACES])
    rank = 0 if place in MAIN else rng.randrange(2)
    if place is None:
        return Kill(rank, None, rng.uniform(0.2, 4))
    return Kill(rank, place, rng.randint(1, PLACES[place][2]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def armed(kill: Kill | None, machine: Machine) -> Iterator[None]:
    if kill is None or kill.rank != machine.rank:
        yield
        return
    if kill.place is None:
        timer = threading.Timer(kill.at, die)
        timer.start()
        yield
        timer.cancel()
        return
    module, name, _ = PLACES[kill.place]
    original, calls = vars(module)[name], 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.at:
            die()
        return original(*arguments, **options)

    with mock.patch.object(module, name, call):
        yield


def fit(recipe: Recipe, stage: int, notes: Path, kill: Kill | None) -> int:
    """A run that notes every step in a file, which outlives it: losses by bits, samples by hash."""
    machine = runs.machine()

    def noted(engine: Any, batches: Any, **options: Any) -> Pending:
        pending = train_step(engine, batches, **options)
        result = read(pending)
        line = {
            "rank": machine.rank,
            "step": engine.global_steps,
            "losses": {name: loss.hex() for name, loss in result.losses.items()},
            "norm": None if result.grad_norm is None else result.grad_norm.hex(),
            "samples": hashlib.sha256(repr([b.keys for b in batches]).encode()).hexdigest(),
        }
        with notes.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return pending

    with (
        armed(kill, machine),
        mock.patch.object(loop, "train_step", noted),
        Preemption() as preemption,
    ):
        ds_config = helpers.resolved(stage, machine.world_size)
        return loop.fit(recipe, ds_config, machine, preemption)


def read_notes(path: Path) -> list[tuple[int, int, str]]:
    lines = path.read_text().splitlines()
    return [(line["step"], line["rank"], repr(line)) for line in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_again_and_again_it_is_the_same_run(stage: int, tmp_path: Path) -> None:
    often = ("train.checkpoint_every=1", "train.eval_every=2", "train.eval_steps=2")
    whole = helpers.recipe(runs.new_folder(), *often)
    assert ranks(2).run(fit, whole, stage, tmp_path / "whole", None) == [0, 0]
    expected = {note[:2]: note for note in read_notes(tmp_path / "whole")}
    assert len(expected) == 2 * helpers.STEPS

    recipe = helpers.recipe(runs.new_folder(), *often)
    rng, kills = random.Random(stage), []
    while len(kills) < KILLS:
        kill = draw(rng)
        try:
            ranks(2).run(fit, recipe, stage, tmp_path / "killed", kill)
        except RankError as error:
            assert f"rank {kill.rank} died" in str(error)
            kills.append(kill)
        else:  # it came to the end: once more from the start
            recipe = helpers.recipe(runs.new_folder(), *often)
    assert ranks(2).run(fit, recipe, stage, tmp_path / "killed", None) == [0, 0]
    found = read_notes(tmp_path / "killed")
    assert {note[:2] for note in found} == expected.keys()
    for note in found:
        assert note == expected[note[:2]], kills
    assert (recipe.output_dir / "checkpoints/latest").read_text() == "step_00000006"
