import dataclasses
import functools
import sys
from pathlib import Path

import pytest

from tests.nodes.sshd import Nodes
from tests.ports import free_port
from vlm.nodes.hosts import preflight, ssh
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, Wanted

ROOT = Path(__file__).parents[3]
WANTED = Wanted((), {}, 0, gpus=False)


def look(nodes: Nodes, hosts: list[Host], output: Path, **changes: object) -> list[Verdict]:
    run = functools.partial(ssh.run, timeout_s=120, known_hosts=nodes.known_hosts)
    given = {"python": sys.executable, "folder": ROOT, "files": {}, **changes}
    wanted = dataclasses.replace(WANTED, paths=(str(output),))
    port = free_port()
    return preflight.look(hosts, run, wanted=wanted, port=port, **given)


def test_hosts_that_answer_and_reach_each_other_pass(nodes: Nodes, tmp_path: Path) -> None:
    found = look(nodes, nodes.hosts, tmp_path)
    assert [(v.problems, v.warnings, v.iface) for v in found] == [([], [], "lo")] * 3
    assert [v.host for v in found] == nodes.hosts


def test_each_host_that_does_not_is_named(nodes: Nodes, tmp_path: Path) -> None:
    good, *others = nodes.hosts
    closed = dataclasses.replace(others[0], port=1)
    keyless = dataclasses.replace(others[1], key="/nowhere")
    passed, refused, denied = look(nodes, [good, closed, keyless], tmp_path)
    assert passed.ok
    assert refused.problems[0].startswith("ssh: ") and "refused" in refused.problems[0]
    assert denied.problems[0].startswith("ssh: ") and "denied" in denied.problems[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "/nowhere/python"}, "/nowhere/python ended with 127"),
        ({"folder": Path("/nowhere")}, "the toolkit is not in the folder"),
        ({"files": {"/nowhere/0.tar": 7}}, "shards: /nowhere/0.tar: No such file"),
    ],
)
def test_what_is_missing_on_a_host(
    nodes: Nodes, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    (found,) = look(nodes, nodes.hosts[:1], tmp_path, **changes)
    assert expected in found.problems[0]


@pytest.mark.parametrize("said", ["Welcome!\n", "", "[1]\n", "{} \n"])
def test_an_answer_that_is_none(said: str) -> None:
    def run(host: Host, text: str) -> ssh.Answer:
        return ssh.Answer(0, said, "")

    (found,) = preflight.look(
        [Host("127.0.0.1", 1)],
        run,
        python="python",
        folder=ROOT,
        wanted=WANTED,
        files={},
        port=1,
    )
    assert found.problems == [preflight.UNREADABLE]
    found.facts["address"] = "127.0.0.1"
    given = {"python": "python", "folder": ROOT, "port": 1, "cpu": True}
    assert preflight.exercise([found], run, **given) is None
    assert found.problems == [preflight.UNREADABLE] * 2


def test_an_exercise_that_fails_is_the_hosts_problem(nodes: Nodes, tmp_path: Path) -> None:
    found = look(nodes, nodes.hosts[:2], tmp_path)

    def run(host: Host, text: str) -> ssh.Answer:
        assert "--nnodes=2" in text and "GLOO_SOCKET_IFNAME=lo" in text
        return ssh.Answer(1, "", "trace\nRuntimeError: Connection closed by peer\n")

    speed = preflight.exercise(found, run, python=sys.executable, folder=ROOT, port=29500, cpu=True)
    assert speed is None
    assert all("Connection closed by peer" in v.problems[0] for v in found)
