import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.nodes.jobs import lives
from tests.waiting import wait_for
from vlm.nodes.agent import leftovers

#: starts a child without its mark, in its group
PARENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
env = {"PATH": os.environ["PATH"]}
child = subprocess.Popen(["sleep", "100"], env=env)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(100)
"""


def test_marked_processes_and_their_groups_end_and_no_others(tmp_path: Path) -> None:
    def start(mark: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", PARENT, tmp_path / mark],
            env={**os.environ, leftovers.MARK: mark},
            start_new_session=True,
        )

    mine, other = start("mine"), start("other")
    wait_for(
        lambda: all(
            (tmp_path / m).exists() and (tmp_path / m).read_text() for m in ("mine", "other")
        )
    )
    os.kill(mine.pid, signal.SIGSTOP)
    assert [process.pid for process in leftovers.marked("mine")] == [mine.pid]
    begun = time.monotonic()
    assert leftovers.kill("mine") == [] and time.monotonic() - begun < 5
    assert mine.wait() == -signal.SIGKILL
    child = int((tmp_path / "mine").read_text())
    wait_for(lambda: not lives(child), 30)
    assert other.poll() is None and lives(int((tmp_path / "other").read_text()))
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert leftovers.kill("nobody's") == []
