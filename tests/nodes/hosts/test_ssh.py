import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nodes.sshd import Nodes
from vlm.nodes.hosts import ssh
from vlm.nodes.hosts.hostfile import Host

AWKWARD = [
    "<|image|>",
    "$HOME",
    "'q'",
    ";",
    "a b",
    "",
    "*",
    "`id`",
    "$(id)",
    "\\",
    "&",
    "!x",
    "é\n",
]
SAY = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('K'), os.getcwd()]))"


def test_every_value_arrives_unchanged(nodes: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME; here"
    folder.mkdir()
    secret = 's\'3cret $(id) "x"'
    text = ssh.script([sys.executable, "-c", SAY, *AWKWARD], folder, {"K": secret})

    def ask(host: Host) -> ssh.Answer:
        return ssh.run(host, text, timeout_s=60, known_hosts=nodes.known_hosts)

    for answer in ssh.on_all(nodes.hosts, ask):
        assert answer.code == 0, answer.stderr
        assert json.loads(answer.stdout) == [AWKWARD, secret, str(folder)]


def test_nothing_of_a_script_stands_in_the_arguments() -> None:
    host = Host("10.0.0.4", 8, user="root", port=2222, key="~/.ssh/k")
    argv = ssh.command(host)
    assert argv[0] == "ssh" and argv[-3:] == ["--", "10.0.0.4", "exec bash -s"]
    assert argv[argv.index("-p") + 1] == "2222" and argv[argv.index("-l") + 1] == "root"
    assert argv[argv.index("-i") + 1] == str(Path.home() / ".ssh/k")
    assert "-oBatchMode=yes" in argv and "-oStrictHostKeyChecking=accept-new" in argv


def test_exit_codes_and_what_was_said(nodes: Nodes) -> None:
    host = nodes.hosts[0]
    known = {"known_hosts": nodes.known_hosts}
    text = "echo out; echo err >&2; exit 3\n"
    assert ssh.run(host, text, timeout_s=30, **known) == ssh.Answer(3, "out\n", "err\n")
    missing = ssh.script(["true"], Path("/nowhere/at all"))
    answer = ssh.run(host, missing, timeout_s=30, **known)
    assert answer.code == 1 and "/nowhere/at all" in answer.stderr
    begun = time.monotonic()
    assert ssh.run(host, "sleep 60\n", timeout_s=1, **known).code is None
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"port": 1}, "refused"),
        ({"key": "/nowhere"}, "denied"),
        ({"name": "no.invalid"}, "resolve"),
    ],
)
def test_a_host_that_cannot_be_reached(nodes: Nodes, change: dict[str, object], said: str) -> None:
    host = dataclasses.replace(nodes.hosts[0], **change)
    answer = ssh.run(host, "true\n", timeout_s=30, known_hosts=nodes.known_hosts)
    assert answer.code == ssh.SSH_FAILED
    assert said in answer.stderr


def test_variables_of_the_provider_and_of_the_node_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh that runs a command reads no login files."""
    (tmp_path / "provider").write_text("export POD='a b'\nexport BOTH=provider\n")
    (tmp_path / ".saccade_env").write_text("export BOTH=node\nexport K=node\n")
    monkeypatch.setattr(ssh, "PROVIDER_ENV", str(tmp_path / "provider"))
    monkeypatch.setenv("HOME", str(tmp_path))
    text = ssh.script(["printenv", "POD", "BOTH", "K"], env={"K": "given"})
    answer = ssh.run(Host(ssh.LOCALHOST, 1), text, timeout_s=60)
    assert answer == ssh.Answer(0, "a b\nnode\ngiven\n", "")


def test_on_this_machine_all_that_was_started_ends_in_time() -> None:
    begun = time.monotonic()
    answer = ssh.run(Host(ssh.LOCALHOST, 1), "sleep 60 & sleep 60\n", timeout_s=1)
    assert answer == ssh.Answer(None, "", "no answer within 1 s")
    assert time.monotonic() - begun < 20


def test_of_a_host_that_never_stops_talking_the_beginning_is_kept() -> None:
    for stream in ("stdout", "stderr"):
        text = f"head -c {3 * ssh.MAX_ANSWER} /dev/zero | tr '\\0' x >/dev/{stream}; exit 3\n"
        answer = ssh.run(Host(ssh.LOCALHOST, 1), text, timeout_s=60)
        assert answer.code == 3 and len(answer.stdout + answer.stderr) == ssh.MAX_ANSWER


def test_a_host_that_does_not_listen() -> None:
    long = "exec true\n" + "#" * 2**22
    assert ssh.run(Host(ssh.LOCALHOST, 1), long, timeout_s=60) == ssh.Answer(0, "", "")


def test_a_program_reads_what_follows_the_script(nodes: Nodes) -> None:
    """So an agent learns from the end of its input that the launcher is gone."""
    argv = ssh.command(nodes.hosts[1], nodes.known_hosts)
    text = ssh.script(["cat"]) + "what follows\n"
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60)
    assert done.stdout == "what follows\n"
