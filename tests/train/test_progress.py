import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vlm import dist
from vlm.train import progress as progress_module
from vlm.train.progress import LINE_EVERY_S, Progress, format_s


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """sys.stderr is a terminal, and logging goes there as ``vlm.log.setup`` has it.

    Not a fixture: pytest puts its own stderr back between a fixture and the test.
    """
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        handler = logging.StreamHandler()
        logger = logging.getLogger("vlm")
        logger.addHandler(handler)
        try:
            yield terminal
        finally:
            logger.removeHandler(handler)
        assert handler.stream is terminal
        assert sys.stderr is terminal


def run(clock: Clock, num_steps: int, seconds_per_step: float, first: int = 0) -> None:
    with Progress(num_steps, step=first) as progress:
        for step in range(first + 1, num_steps + 1):
            clock.now += seconds_per_step
            progress.update(step, loss=2.0 / step, samples_per_s=64.25)


def test_a_log_file_gets_a_line_now_and_then(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(clock, num_steps=100, seconds_per_step=1.0)
    lines = [record.getMessage() for record in caplog.records]
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    every = int(LINE_EVERY_S)
    assert shown == [*range(1, 100, every), 100]
    assert (
        lines[1] == f"step {1 + every}/100  loss {2 / (1 + every):.4f}  64.2 samples/s  1m09s left"
    )
    assert lines[-1].endswith("0s left")


def test_a_log_file_gets_no_control_codes(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(clock, num_steps=3, seconds_per_step=1.0)
    captured = capfd.readouterr()
    assert "\x1b" not in captured.err + captured.out


def test_time_left_forgets_a_slow_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(1000) as progress:
        clock.now += 600
        for step in range(1, 501):
            clock.now += 0.1
            progress.update(step)
        clock.now += LINE_EVERY_S
        progress.update(501)
    # 50 updates ago is 50 * 0.1 s and the pause of 30 s; the first 600 s are not in it.
    expected_s = 499 * (LINE_EVERY_S + 48 * 0.1) / 49
    assert caplog.records[-1].getMessage() == f"step 501/1000  {format_s(expected_s)} left"


def test_a_resumed_run_counts_from_where_it_is(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(clock, num_steps=100, seconds_per_step=1.0, first=90)
    assert caplog.records[0].getMessage().startswith("step 91/100")
    assert caplog.records[0].getMessage().endswith("9s left")


def test_a_terminal_gets_a_bar_that_leaves_the_log_alone(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(4) as progress:
        progress.update(1, loss=0.5, samples_per_s=10.0)
        logging.getLogger("vlm.somewhere").warning("a line [red]between[/red]")
        progress.update(4, loss=0.25, samples_per_s=10.0)
    shown = terminal.getvalue()
    assert "4/4" in re.sub(r"\x1b\[\d*m", "", shown)
    assert "loss 0.2500" in shown
    # Alone on its line: the bar was erased before and is drawn again below.
    (line,) = [line for line in shown.split("\n") if "between" in line]
    assert line.endswith("\x1b[2Ka line [red]between[/red]")
    assert shown.endswith("\x1b[?25h"), "the cursor comes back"


def test_an_error_leaves_the_terminal_usable(clock: Clock) -> None:
    with on_terminal() as terminal:
        with pytest.raises(KeyboardInterrupt), Progress(4) as progress:
            progress.update(1)
            raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_other_ranks_show_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    with caplog.at_level(logging.INFO), on_terminal() as terminal:
        run(clock, num_steps=3, seconds_per_step=60.0)
    assert not caplog.records
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7620, "2h07m"),
        (86_400 * 3 + 4 * 3600, "3d04h"),
        (None, "?"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_s(seconds) == text
