"""Real ssh servers on loopback addresses: the nodes of tests."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from tests.system import require
from tests.waiting import wait_for
from vlm.nodes.hosts.hostfile import Host


@dataclass(frozen=True)
class Node:
    host: Host
    server: subprocess.Popen[bytes]
    #: programs in here come before all others on this host, and are on no other one
    programs: Path

    def stop(self) -> None:
        """As when the machine goes down: the server and all its connections."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()


@dataclass(frozen=True)
class Nodes:
    folder: Path
    nodes: list[Node]

    @property
    def hosts(self) -> list[Host]:
        return [node.host for node in self.nodes]

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"


@contextlib.contextmanager
def nodes(folder: Path, count: int, slots: int = 1) -> Iterator[Nodes]:
    """``count`` servers on 127.0.0.2, 127.0.0.3, ..., one port, key authentication only."""
    server, _ = require("openssh-server"), require("openssh-client")
    folder.mkdir(mode=0o700, parents=True)
    for name in ("client", "host"):
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", folder / name], check=True)
    keys = folder / "authorized_keys"
    keys.write_text((folder / "client.pub").read_text())
    keys.chmod(0o600)
    if os.geteuid() == 0:  # where Debian's server keeps its own
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    made: list[Node] = []
    try:
        for index in range(count):
            address = f"127.0.0.{2 + index}"
            config, programs = folder / f"{address}.conf", folder / address
            programs.mkdir()
            path = f"{programs}:{PATH}"
            config.write_text(CONFIG.format(folder=folder, address=address, port=port, path=path))
            process = subprocess.Popen(
                [server, "-D", "-e", "-f", str(config)],
                stderr=(folder / f"{address}.log").open("wb"),
                start_new_session=True,
            )
            host = Host(
                address, slots, user=getpass.getuser(), port=port, key=str(folder / "client")
            )
            made.append(Node(host, process, programs))
        wait_for(lambda: all(answers(node) for node in made))
        yield Nodes(folder, made)
    finally:
        for node in made:
            node.stop()


#: the interpreter of the tests comes first, as on a machine set up for training
PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin", "/usr/sbin", "/sbin"])
CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
SetEnv PATH={path} HOST_API_KEY=planted-in-the-host
"""


def answers(node: Node) -> bool:
    assert node.server.poll() is None, "the ssh server did not start"
    with (
        contextlib.suppress(OSError),
        socket.create_connection((node.host.name, node.host.port), 1) as connection,
    ):
        return bool(connection.recv(3))
    return False
