"""What happens to the ranks of a real job at a chosen step.

Ranks do it to themselves, so that no test has to look in time: on an idle machine a small run is
over before anybody has noticed that it has come to some step.
"""

from pathlib import Path

from tests.launch.running import ROOT

#: found by ranks alone, by way of PYTHONPATH; each fault is removed by the rank that it happens to
HOOK = """
import os, pathlib, signal, time
from vlm import heartbeat

here = pathlib.Path(__file__).parent
say = heartbeat.Heartbeat.beat

def beat(self, phase, step, shards=()):
    say(self, phase, step, shards)
    fault = here / f"rank_{os.environ['RANK']}_{phase}_{step}"
    if fault.exists():
        text = fault.read_text()
        fault.unlink()
        exec(text)
    if phase == "train" and (here / "slow").exists():
        time.sleep(0.5)

heartbeat.Heartbeat.beat = beat
"""
KILL_RANK = "os.kill(os.getpid(), signal.SIGKILL)"
KILL_AGENT = "os.kill(os.getppid(), signal.SIGKILL)"
STOP_RANK = "os.kill(os.getpid(), signal.SIGSTOP)"
FREEZE_HOST = f"os.kill(os.getppid(), signal.SIGSTOP); {STOP_RANK}"


class Faults:
    """Of the job in this folder. Its ranks need ``options``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "faults"
        self._folder.mkdir()
        (self._folder / "sitecustomize.py").write_text(HOOK)
        self.options = ["--env", f"PYTHONPATH={self._folder}:{ROOT}"]

    def at(self, rank: int, step: int, code: str) -> None:
        """Python code that a rank runs once, when it begins to train on a step."""
        (self._folder / f"rank_{rank}_train_{step}").write_text(code)

    def slow(self, on: bool) -> None:
        """Half a second more for each step, so that a job is still there when it is looked for."""
        if on:
            (self._folder / "slow").touch()
        else:
            (self._folder / "slow").unlink()
