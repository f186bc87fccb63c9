import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.nodes.jobs import ROOT, lives
from tests.waiting import wait_for
from vlm import heartbeat
from vlm.nodes.agent import rank

SCRIPT = """
import os, sys, time
from vlm.heartbeat import Heartbeat
print("said", sys.argv, __name__, os.path.basename(sys.path[0]))
print("wrong", file=sys.stderr)
Heartbeat().beat("train", 4)
def waits_here():
    time.sleep(100)
if "wait" in sys.argv:
    waits_here()
sys.exit(5)
"""


def start(folder: Path, *argv: str, agent: int) -> subprocess.Popen[bytes]:
    script = folder / "scripts/script.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "vlm.nodes.agent.rank", folder, folder, script, *argv]
    env = {**os.environ, "RANK": "3", "SACCADE_AGENT": str(agent), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, cwd=ROOT)


def test_output_beat_and_code_of_a_script(tmp_path: Path) -> None:
    done = start(tmp_path, "a b", agent=os.getpid())
    assert done.wait(60) == 5
    script = tmp_path / "scripts/script.py"
    text = rank.log_path(tmp_path, 3).read_text()
    assert text == f"said {[str(script), 'a b']} __main__ scripts\nwrong\n"
    beat = heartbeat.read(rank.beat_path(tmp_path, 3))
    assert beat is not None and beat.step == 4


def test_stacks_on_a_signal(tmp_path: Path) -> None:
    waiting = start(tmp_path, "wait", agent=os.getpid())
    wait_for(lambda: heartbeat.read(rank.beat_path(tmp_path, 3)))
    waiting.send_signal(rank.STACKS)
    wait_for(lambda: "waits_here" in rank.stacks_path(tmp_path, 3).read_text())
    assert waiting.poll() is None
    waiting.kill()
    waiting.wait()


def test_it_ends_with_its_agent(tmp_path: Path) -> None:
    assert start(tmp_path, "wait", agent=1).wait(60) == -signal.SIGKILL  # it is gone already
    parent = os.fork()
    if parent == 0:
        start(tmp_path, "wait", agent=os.getpid())
        signal.pause()
    path = rank.log_path(tmp_path, 3)
    wait_for(lambda: path.exists() and "wrong" in path.read_text())
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: not any(lives(int(child)) for child in children), 30)
