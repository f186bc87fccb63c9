import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch/hostfile.py"


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_one_is_made_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    hosts = ["root@10.0.0.4:2222", "10.0.0.5"]
    done = run("hosts", *hosts, "--slots", 8)
    text = "10.0.0.4 slots=8 user=root port=2222\n10.0.0.5 slots=8\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    made = run("hosts", *hosts, "--slots", 8, "--output", path)
    assert made.returncode == 0 and path.read_text() == text
    checked = run("check", path)
    assert checked.returncode == 0 and "8-15" in checked.stdout


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\n-oProxyCommand=x slots=1\n")
    for argv in (["check", tmp_path / "hostfile"], ["check", tmp_path / "no"], ["slurm"]):
        done = run(*argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "line 2" in run("check", tmp_path / "hostfile").stderr
