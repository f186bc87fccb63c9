import subprocess
import sys
from pathlib import Path

from vlm.nodes.launcher.record import Record

ROOT = Path(__file__).parents[2]


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/status.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_job_that_has_ended_and_none(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", [])
    record.say("what was said")
    record.finish(137)
    done = run(tmp_path, "--follow")
    assert done.returncode == 137
    shown = run(tmp_path)
    assert shown.returncode == 137 and "ended with 137" in shown.stdout
    assert "launcher | what was said" in shown.stdout
    stopped = run(tmp_path, "--stop")
    assert stopped.returncode == 2 and "does not run any more" in stopped.stderr
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
