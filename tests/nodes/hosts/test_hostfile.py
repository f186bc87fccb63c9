import re
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from vlm.errors import ConfigError
from vlm.nodes.hosts.hostfile import MAX_BYTES, Host, parse, read, to_text

PLAIN = "# two machines\n\nworker-1 slots=4\n10.0.0.7   slots=2  # the small one\n"


def test_deepspeeds_own_files_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(PLAIN)
    found = read(path)
    assert found == [Host("worker-1", 4), Host("10.0.0.7", 2)]
    assert {host.name: host.slots for host in found} == dict(fetch_hostfile(str(path)))


def test_deepspeed_reads_what_is_written(tmp_path: Path) -> None:
    hosts = [
        Host("node-0", 8, user="root", port=2222, addr="10.65.0.2", iface="ens1", key="~/.ssh/id"),
        Host("2001:db8::7", 1, key="/keys/a+b@c"),
        Host("node_2.example.org", 1024),
    ]
    path = tmp_path / "hostfile"
    path.write_text(to_text(hosts))
    assert read(path) == hosts
    assert dict(fetch_hostfile(str(path))) == {host.name: host.slots for host in hosts}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a", "expected slots=N right behind a"),
        ("a slots = 2", "found 'slots'"),
        ("a slots=0", "expected a number from 1 to 1024"),
        ("a slots=2abc", "found 'slots=2abc'"),
        ("a slots=99999999", "found 'slots=99999999'"),
        ("a slots=2 slots=3", "slots= stands there twice"),
        ("a slots=2 and more", "found 'and'"),
        ("a user=root slots=2", "expected slots=N right behind a"),
        ("a slots=2 prot=22", "found 'prot=22', expected slots=, user=, port="),
        ("a slots=2 port=0", "port=0"),
        ("a slots=2 port=65536", "port=65536"),
        ("a slots=2 user=-oProxyCommand=x", "a login name"),
        ("a slots=2 user=x;reboot", "a login name"),
        ("a slots=2 key=-oProxyCommand=x", "a private key"),
        ("a slots=2 key=$(reboot)", "a private key"),
        ("a slots=2 iface=eth0;reboot", "a network interface"),
        ("a slots=2 addr=$(reboot)", "expected a host name"),
        ("-oProxyCommand=reboot slots=2", "expected a host name"),
        ("root@a slots=2", "expected a host name"),
        ("a:22 slots=2", "expected a host name"),
        ("node[1-2] slots=2", "expected a host name"),
        ("fe80::1%;reboot slots=2", "expected a host name"),
        ("a..b slots=2", "expected a host name"),
        ("a`reboot` slots=2", "expected a host name"),
        ("\u0430 slots=2", "expected a host name"),  # a Cyrillic letter
        ("first slots=1", "host first stands in line 2 already"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"hostfile H, line 3: ") as caught:
        parse(f"# hosts\nfirst slots=1\n{line}\nlast slots=1\n", "H")
    assert reason in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file .*launch/hostfile.py"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="names no host"):
        read(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary: "):
        read(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=re.escape("more than 1,048,576 bytes")):
        read(tmp_path / "huge")


def test_what_would_not_be_read_back_is_not_written() -> None:
    for host in (Host("a b", 1), Host("a", 0), Host("a", 1, user="x\nb slots=9")):
        with pytest.raises(ConfigError):
            to_text([host])
