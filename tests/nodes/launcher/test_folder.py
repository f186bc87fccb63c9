import os
import socket
import sys
from pathlib import Path

import psutil
import pytest

from vlm.errors import ConfigError
from vlm.nodes.launcher import folder
from vlm.nodes.launcher.record import Record

LAUNCHER = """
import sys, time
from pathlib import Path
from vlm.nodes.launcher.record import Record
print("starting")
if sys.argv[2] == "fails":
    sys.exit("error: that went wrong")
if sys.argv[2] == "waits":
    time.sleep(60)
Record(Path(sys.argv[1]), "job", []).write()
time.sleep(60)
"""


def test_one_launcher_at_a_time(tmp_path: Path) -> None:
    with folder.held(tmp_path / "job"):
        with pytest.raises(ConfigError, match="a launcher holds it"), folder.held(tmp_path / "job"):
            pass
    with folder.held(tmp_path / "job"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected one that can be written"):
        with folder.held(tmp_path / "file/job"):
            pass


def test_what_lives(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", [])
    record.write()
    state = folder.read(tmp_path)
    assert folder.alive(state)
    assert not folder.alive({**state, "created": state["created"] - 60})  # its pid was used again
    assert folder.alive({**state, "host": "elsewhere", "pid": 1})
    record.finish(0)
    assert not folder.alive(folder.read(tmp_path))
    with pytest.raises(ConfigError, match="does not run any more"):
        folder.stop(tmp_path)
    with pytest.raises(ConfigError, match=r"state\.json cannot be read"):
        folder.read(tmp_path / "nowhere")


def test_a_launcher_that_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def argv(how: str) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, str(tmp_path), how]

    with monkeypatch.context() as hurried:
        hurried.setattr(folder, "DETACH_S", 0.2)
        with pytest.raises(ConfigError, match="did not start"):
            folder.detach(argv("waits"), tmp_path)
    started = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [line for line in started if str(tmp_path) in line]  # it does not come up later
    with pytest.raises(ConfigError, match="did not start: error: that went wrong"):
        folder.detach(argv("fails"), tmp_path)
    pid = folder.detach(argv("runs"), tmp_path)
    state = folder.read(tmp_path)
    assert state["pid"] == pid and state["host"] == socket.gethostname()
    assert os.getsid(pid) == pid  # no terminal's
    folder.stop(tmp_path)
    psutil.wait_procs([psutil.Process(pid)], timeout=10)
    assert not folder.alive(folder.read(tmp_path))
