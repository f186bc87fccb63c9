from typing import Any

import pytest

from tests.nodes.facts import facts, gpu
from vlm.nodes.hosts import verdict
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, Wanted

WANTED = Wanted(("/runs", "/tmp"), {"/m": "abc"}, int(5e9), gpus=True)


def judged(*found: dict[str, Any], wanted: Wanted = WANTED) -> list[Verdict]:
    verdicts = [
        Verdict(Host(f"h{index}", 2), facts=one, iface="ens1", why_iface="because")
        for index, one in enumerate(found)
    ]
    verdict.judge(verdicts, wanted)
    return verdicts


def test_hosts_that_are_alike_pass() -> None:
    for found in judged(facts(), facts(), facts()):
        assert found.ok and not found.warnings
        assert verdict.line(found) == (
            f"ok    {found.host.name}  2 x A100; torch 2.13.0; over ens1 (because)"
        )


FULL = {"free": int(1e9), "total": int(2e11), "writable": True}
LOCKED = {"free": int(1e11), "total": int(2e11), "writable": False}
SMALL = {"free": 2**26, "total": 2**26, "writable": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"skew_s": -40.0}, "its clock is -40.0 s off"),
        ({"python": "3.12.1"}, "python differs: found 3.12.1, the others have 3.11.7"),
        ({"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "torch differs: found 2.12.0"),
        ({"packages": {"torch": None, "deepspeed": "0.19.8"}}, "torch is not installed"),
        ({"cuda": "11.8"}, "cuda differs: found 11.8"),
        ({"nccl": None}, "nccl differs: found None"),
        ({"code": "4567"}, "toolkit differs: found 4567, the others have 0123"),
        ({"code": None}, "the toolkit is not in the folder"),
        ({"gpus": [gpu(0)]}, "1 GPUs for 2 slots"),
        ({"gpus": [], "gpu_fault": "no answer"}, "0 GPUs for 2 slots (nvidia-smi: no answer)"),
        (
            {"gpus": [gpu(0, fault="[GPU is lost]"), gpu(1)]},
            "1 GPUs for 2 slots (GPU 0 does not answer: [GPU is lost])",
        ),
        ({"gpus": [gpu(0), gpu(1, num_processes=3)]}, "GPU 1 is in use: 3 processes"),
        ({"gpus": [gpu(0, used_mib=70000), gpu(1)]}, "GPU 0 is in use: 0 processes, 70000 MiB"),
        ({"gpus": [gpu(0, ecc_errors=2), gpu(1)]}, "GPU 0 has 2 uncorrected memory errors"),
        ({"missing": ["/s/0.tar: gone", "x"]}, "shards: /s/0.tar: gone and 1 more"),
        ({"manifests": {"/m": None}}, "manifest /m is not there"),
        ({"manifests": {"/m": "def"}}, "manifest /m is another one than here"),
        ({"port": "Address already in use"}, "master port cannot be used: Address already"),
        ({"disks": {"/runs": FULL}}, "/runs has 1.0 GB free, expected 5"),
        ({"disks": {"/runs": LOCKED}}, "/runs cannot be written to"),
        ({"disks": {"/dev/shm": SMALL}}, "/dev/shm has 64 MiB; NCCL needs 1 GiB"),
    ],
)
def test_what_stands_in_the_way(changes: dict[str, Any], expected: str) -> None:
    first, bad, last = judged(facts(), facts(**changes), facts())
    assert first.ok and last.ok
    assert len(bad.problems) == 1 and expected in bad.problems[0]
    assert verdict.line(bad) == f"FAIL  h1  {bad.problems[0]}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"open_files": 1024}, "ulimit -n is 1024"),
        ({"memory": {"free": 2**30, "total": 2**36}}, "1.0 GiB of memory free"),
        (
            {"gpus": [gpu(0), gpu(1), gpu(2, fault="[Unknown Error]")]},
            "GPU 2 does not answer: [Unknown Error]",
        ),
        (
            {"gpus": [gpu(0, fault="[GPU is lost]", ecc_errors=9), gpu(1), gpu(2)]},
            "GPU 0 does not answer: [GPU is lost]",
        ),
        ({"gpu_fault": "infoROM is corrupted"}, "nvidia-smi: infoROM is corrupted"),
        ({"gpus": [gpu(0, name="H100"), gpu(1, name="H100")]}, "GPUs differ: found H100"),
    ],
)
def test_what_is_only_said(changes: dict[str, Any], expected: str) -> None:
    _, found, _ = judged(facts(), facts(**changes), facts())
    assert found.ok
    assert [expected in warning for warning in found.warnings] == [True]
    assert f"({found.warnings[0]})" in verdict.line(found)


def test_what_a_host_says_cannot_draw_on_the_terminal() -> None:
    wild = "\x1b[2J\nok    h0"
    (found,) = judged(facts(gpus=[], gpu_fault=wild))
    assert verdict.line(found) == "FAIL  h0  0 GPUs for 2 slots (nvidia-smi: \\x1b[2J ok h0)"


def test_of_two_that_differ_the_second_is_named() -> None:
    first, second = judged(facts(), facts(code="9"))
    assert first.ok and "found 9, the others have 0123" in second.problems[0]


def test_hosts_without_gpus() -> None:
    cpu = Wanted((), {}, 0, gpus=False)
    (found,) = judged(facts(gpus=[], disks={"/dev/shm": SMALL}), wanted=cpu)
    assert found.ok and "2 slots on 8 CPU cores" in verdict.line(found)


def test_who_did_not_answer_is_left_as_it_is() -> None:
    silent = Verdict(Host("h", 1), problems=["ssh: Connection refused"])
    verdict.judge([silent], WANTED)
    assert verdict.line(silent) == "FAIL  h  ssh: Connection refused"


def nic(name: str, address: str, up: bool = True) -> dict[str, Any]:
    return {"name": name, "address": address, "mask": "255.255.255.0", "up": up, "mbit": None}


LO, ETH = nic("lo", "127.0.0.1"), nic("eth0", "172.16.0.5")
ENS = [nic("ens2", "10.65.1.2"), nic("ens1", "10.65.0.2")]


@pytest.mark.parametrize(
    ("host", "address", "interfaces", "expected"),
    [
        (Host("h", 1, iface="eth0"), "10.65.0.2", [LO, ETH, *ENS], "eth0"),
        (Host("h", 1), "172.16.0.5", [LO, ETH, *ENS], "ens1"),
        (Host("h", 1), "172.16.0.9", [LO, ETH, nic("wg0", "10.0.0.1")], "eth0"),
        (Host("h", 1), "127.0.0.3", [LO, ETH], "lo"),
        (Host("h", 1), "203.0.113.9", [LO, ETH], "eth0"),  # behind address translation
        (Host("h", 1), "203.0.113.9", [LO, ETH, nic("wg0", "10.0.0.1")], None),
        (Host("h", 1), "203.0.113.9", [LO, ETH, nic("wg0", "10.0.0.1", up=False)], "eth0"),
        (Host("h", 1, iface="ens9"), "10.65.0.2", [LO, *ENS], None),
    ],
)
def test_the_interface(
    host: Host, address: str, interfaces: list[dict[str, Any]], expected: str | None
) -> None:
    iface, why = verdict.choose_interface(host, address, interfaces)
    assert iface == expected and why


def speeds(*gbit: float | None, tflops: float = 200.0) -> list[Verdict]:
    found = [
        Verdict(Host(f"h{index}", 2), gbit=speed, tflops=[tflops, tflops])
        for index, speed in enumerate(gbit)
    ]
    verdict.judge_speed(found)
    return found


def test_a_host_with_a_slow_link_is_named() -> None:
    # h2's cable: what it sends and what it gets is slow
    problems = [found.problems for found in speeds(90, 20, 20, 90, 90)]
    assert [bool(found) for found in problems] == [False, False, True, False, False]
    assert "its links are slow: 20.0 Gbit/s, the median is 90.0" in problems[2][0]


def test_links_that_are_alike_pass_and_one_host_has_none() -> None:
    assert all(found.ok for found in speeds(90, 80, 95))
    assert all(found.ok for found in speeds(90, 20))  # one link: who is slow?
    assert all(found.ok for found in speeds(None))


def test_a_link_too_slow_to_train_over() -> None:
    first, second = speeds(0.09, 0.09)
    assert "0.09 Gbit/s to h1: too slow to train over" in first.problems[0]
    assert "to h0" in second.problems[0]


def test_a_slow_gpu_is_named() -> None:
    found = speeds(90, 90, 90)
    found[1].tflops[1] = 50.0
    verdict.judge_speed(found)
    assert [v.ok for v in found] == [True, False, True]
    assert "slot 1 computes slowly: 50 TFLOP/s, the median is 200" in found[1].problems[0]
