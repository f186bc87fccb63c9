"""Killed with SIGKILL wherever it hurts, in every ZeRO stage, and still the same run bit for bit.

``make test-slow``; ``pytest -m slow -rP tests/train/test_kills.py`` says where the kills fell. Some
kills in every run of the suite are in ``tests/ckpt/test_load.py`` and ``tests/ckpt/test_save.py``.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
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
    "in a step": (step, "by_group", 6),
    "before files are written": (save, "write_pieces", 3),
    "before they are complete": (save, "sync_tree", 4),
    "before latest is moved": (save, "replace_text", 3),
    "before old ones are removed": (save, "prune", 3),
    "in an evaluation": (validate, "eval_step", 3),
}
#: only this rank is there
MAIN = ("before they are complete", "before latest is moved", "before old ones are removed")
LOADS = "while it loads"
#: kills of each place, and kills after a time of chance, in each stage
EACH, BY_CHANCE = 2, 6
#: functions on the stack of a process that is killed by chance, innermost first -> where that is
MOMENTS = {
    "evaluate": "in an evaluation",
    "_save": "in a save",
    "train_step": "in a step",
    "resume": LOADS,
    "build_run": "before the first step",
}
OFTEN = ("train.checkpoint_every=1", "train.eval_every=2", "train.eval_steps=2")


class Kill(NamedTuple):
    rank: int
    #: of PLACES; None: after ``at`` seconds, wherever that is
    place: str | None
    at: float


def draw(rng: random.Random) -> list[Kill]:
    """Every place ``EACH`` times, and ``BY_CHANCE`` kills, in any order."""
    kills = [
        Kill(0 if place in MAIN else rng.randrange(2), place, rng.randint(1, most))
        for place, (_, _, most) in PLACES.items()
        for _ in range(EACH)
    ]
    kills += [Kill(rng.randrange(2), None, rng.uniform(0.2, 3)) for _ in range(BY_CHANCE)]
    rng.shuffle(kills)
    return kills


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_chance(kill: Kill, main: int, moment: Path, ended: threading.Event) -> None:
    """Leaves behind in what it was killed."""
    if ended.wait(kill.at):
        return
    frame, names = sys._current_frames()[main], []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    moment.write_text(next((MOMENTS[name] for name in names if name in MOMENTS), "between"))
    die()


@contextmanager
def armed(kill: Kill | None, machine: Machine, moment: Path) -> Iterator[None]:
    if kill is None or kill.rank != machine.rank:
        yield
        return
    if kill.place is None:
        ended = threading.Event()
        about = (kill, threading.get_ident(), moment, ended)
        threading.Thread(target=die_by_chance, args=about, daemon=True).start()
        yield
        ended.set()
        return
    module, name, _ = PLACES[kill.place]
    original, calls = vars(module)[name], 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.at:
            moment.write_text(str(kill.place))
            die()
        return original(*arguments, **options)

    with mock.patch.object(module, name, call):
        yield


def fit(recipe: Recipe, stage: int, folder: Path, kill: Kill | None) -> int:
    """A run that notes every step in a file, which outlives it: losses by bits, samples by hash."""
    machine = runs.machine()

    def noted(engine: Any, batches: Any, **options: Any) -> Pending:
        pending = train_step(engine, batches, **options)
        result = read(pending)
        line = {
            "rank": machine.rank,
            "step": engine.global_steps,
            "losses": {name: loss.hex() for name, loss in result.losses.items()},
            "norm": result.grad_norm.hex(),
            "samples": hashlib.sha256(repr([b.keys for b in batches]).encode()).hexdigest(),
        }
        with (folder / "notes").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return pending

    with (
        armed(kill, machine, folder / "moment"),
        mock.patch.object(loop, "train_step", noted),
        Preemption() as preemption,
    ):
        ds_config = helpers.resolved(stage, machine.world_size)
        return loop.fit(recipe, ds_config, machine, preemption)


def new_run() -> Recipe:
    return helpers.recipe(runs.new_folder(), *OFTEN)


def killed(recipe: Recipe, stage: int, folder: Path, kill: Kill) -> bool:
    """Whether it was, or the run came to its end before."""
    try:
        ranks(2).run(fit, recipe, stage, folder, kill)
    except RankError as error:
        assert f"rank {kill.rank} died" in str(error)
        return True
    return False


def read_notes(folder: Path) -> list[tuple[int, int, str]]:
    lines = (folder / "notes").read_text().splitlines()
    return [(line["step"], line["rank"], repr(line)) for line in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_again_and_again_it_is_the_same_run(stage: int, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    assert ranks(2).run(fit, new_run(), stage, whole, None) == [0, 0]
    expected = {note[:2]: note for note in read_notes(whole)}
    assert len(expected) == 2 * helpers.STEPS

    recipe, kills = new_run(), draw(random.Random(stage))
    moments: Counter[str] = Counter()
    for kill in kills:
        while not killed(recipe, stage, folder, kill):
            if kill.place != LOADS:  # what has come to its end still loads
                recipe = new_run()
        moments[(folder / "moment").read_text() + ("" if kill.place else ", by chance")] += 1
    assert ranks(2).run(fit, recipe, stage, folder, None) == [0, 0]
    found = read_notes(folder)
    assert {note[:2] for note in found} == expected.keys()
    for note in found:
        assert note == expected[note[:2]], kills
    assert (recipe.output_dir / "checkpoints/latest").read_text() == "step_00000006"
    assert moments.total() == len(PLACES) * EACH + BY_CHANCE >= 20
    print(f"ZeRO {stage}: {dict(sorted(moments.items()))}")
