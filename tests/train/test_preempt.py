import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.errors import EXIT_PREEMPTED
from vlm.train import loop, preempt, validate
from vlm.train.metrics import read_rows
from vlm.train.preempt import LIMIT, ORPHANED, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_agreed_one_boundary_later(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert preemption.agreed() is None
        os.kill(os.getpid(), number)
        assert preemption.agreed() is None
        assert preemption.agreed() == number.name == preemption.reason
    assert signal.getsignal(number) is before


def test_where_nothing_else_follows_it_is_agreed_at_once() -> None:
    with Preemption() as preemption:
        assert preemption.agreed(now=True) is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.agreed(now=True) == "SIGTERM"


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = mock.Mock(monotonic=lambda: 7.0)
    monkeypatch.setattr(preempt, "time", clock)
    with Preemption(2) as preemption:
        clock.monotonic = lambda: 7.0 + 7199
        assert preemption.agreed(now=True) is None
        clock.monotonic = lambda: 7.0 + 7200
        assert preemption.agreed(now=True) == LIMIT


def test_the_launcher_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preempt._launcher() is None  # nobody started this process as a rank
    monkeypatch.setenv("CROSS_RANK", "0")
    grandparent = os.popen(f"ps -o ppid= -p {os.getppid()}").read()
    assert preempt._launcher() == (os.getppid(), int(grandparent))
    with Preemption() as preemption:
        assert preemption.agreed(now=True) is None
        monkeypatch.setattr(preempt, "_launcher", lambda: (1, 0))
        assert preemption.agreed(now=True) == ORPHANED


@contextmanager
def signalled(where: str, at: int, number: int) -> Iterator[None]:
    """This process gets a signal when something begins for the ``at``-th time."""
    module, name = {
        "start": (loop, "build_run"),
        "step": (loop, "_step"),
        "evaluation": (validate, "eval_step"),
    }[where]
    original, calls = vars(module)[name], 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with mock.patch.object(module, name, call):
        yield


def fit(recipe: Recipe, stage: int, rank: int, where: str, at: int, number: int) -> runs.Ended:
    """A run of which one rank gets a signal."""
    with signalled(where, at if runs.machine().rank == rank else 0, number):
        return runs.fit_to_end(recipe, stage)


def test_whichever_rank_is_told_all_save_at_the_same_boundary_and_go_on() -> None:
    """Before the first step, while the rate warms up, in an evaluation; then to the end.

    The bound: a signal in one step or evaluation step stops the run after the next one.
    """
    longer = "train.eval_steps=4"
    whole = helpers.recipe(runs.new_folder(), longer)
    expected = ranks(2).run(runs.fit_to_end, whole, 2)
    recipe = helpers.recipe(runs.new_folder(), longer)
    stops = [
        (1, "start", 1, signal.SIGUSR1, 0),
        (0, "step", 1, signal.SIGTERM, 2),
        (1, "evaluation", 2, signal.SIGUSR1, 3),
        (0, "step", 1, signal.SIGTERM, 5),
    ]
    done: list[list[runs.Step]] = [[], []]
    for rank, where, at, number, saved in stops:
        ended = ranks(2).run(fit, recipe, 2, rank, where, at, number)
        assert [code for _, code in ended] == [EXIT_PREEMPTED] * 2
        for steps, (more, _) in zip(done, ended, strict=True):
            steps += more
            assert len(steps) == saved
        assert (recipe.output_dir / "checkpoints/latest").read_text() == f"step_{saved:08d}"
    for steps, (more, code) in zip(done, ranks(2).run(runs.fit_to_end, recipe, 2), strict=True):
        steps += more
        assert code == 0
    assert done == [steps for steps, _ in expected]
    names = ("step", "eval_loss", "eval_loss_fine", "eval_loss_coarse")
    found, evaluated = (
        [
            [row[name] for name in names]
            for row in read_rows(r.output_dir / "metrics.jsonl")
            if row["event"] == "eval"
        ]
        for r in (recipe, whole)
    )
    assert found == evaluated


def test_out_of_time_in_the_last_evaluation_it_is_made_up_for() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.eval_steps=4", "train.steps=1")
    ((steps, code),) = ranks(1).run(fit, recipe, 2, 0, "evaluation", 1, signal.SIGTERM)
    assert (len(steps), code) == (1, EXIT_PREEMPTED)
    assert [r["event"] for r in read_rows(recipe.output_dir / "metrics.jsonl")] == [
        "train",
        "checkpoint",
    ]
    assert ranks(1).run(runs.fit_to_end, recipe, 2) == [([], 0)]
    last = read_rows(recipe.output_dir / "metrics.jsonl")[-1]
    assert (last["event"], last["step"]) == ("eval", 1)
