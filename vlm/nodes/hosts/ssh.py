"""Running a script on a host through OpenSSH.

Nothing of the script stands in an argument list: it goes over ssh's standard input, so that no
shell reads it but the one that is to run it, and nobody finds a secret in `ps`. Not here: what the
scripts do (``vlm.nodes.hosts.preflight``, ``vlm.nodes.launcher.supervise``).
"""

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from vlm.nodes.hosts.hostfile import Host

S = TypeVar("S")
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
LOCALHOST = "localhost"
#: an unanswered connection counts as dead after ``ALIVE_S * ALIVE_COUNT``
ALIVE_S, ALIVE_COUNT = 15, 4
#: what ssh itself returns when it could not connect, or lost the connection
SSH_FAILED = 255
#: bytes of an answer that are kept
MAX_ANSWER = 4 * 2**20
CHUNK = 2**16
#: RunPod writes a container's variables there and sources them for people who log in only
PROVIDER_ENV = "/etc/rp_environment"
#: of launch/setup_node.sh
NODE_ENV = '"$HOME/.saccade_env"'


class Answer(NamedTuple):
    """``code`` None: it did not end in time."""

    code: int | None
    stdout: str
    stderr: str


def command(host: Host, known_hosts: Path | None = None) -> list[str]:
    """What starts ``bash -s`` on a host; it reads its script from standard input.

    A hostfile's ``localhost`` is this machine, which needs no ssh server.

    Args:
        known_hosts: in place of the user's file of host keys.
    """
    if host.name == LOCALHOST:
        return ["bash", "-s"]
    options = {
        "BatchMode": "yes",  # asks nobody for a password
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": ALIVE_S,
        "ServerAliveCountMax": ALIVE_COUNT,
        # the first key of a host is believed, another one later is not
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    if known_hosts is not None:
        options["UserKnownHostsFile"] = str(known_hosts)
    argv = ["ssh", "-T", *(f"-o{name}={value}" for name, value in options.items())]
    argv += ["-p", str(host.port)]
    if host.user:
        argv += ["-l", host.user]
    if host.key:
        argv += ["-i", str(Path(host.key).expanduser())]
    return [*argv, "--", host.name, "exec bash -s"]


def script(
    argv: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Shell text that runs ``argv`` in ``folder`` with ``env``; every value arrives unchanged.

    What ``argv`` then finds on its standard input is what follows the script.
    """
    lines = [f"if [ -r {file} ]; then . {file}; fi" for file in (PROVIDER_ENV, NODE_ENV)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    if folder is not None:
        lines.append(f"cd -- {shlex.quote(str(folder))} || exit 1")
    lines.append(f"exec {shlex.join(argv)}")
    return "".join(f"{line}\n" for line in lines)


def run(host: Host, text: str, *, timeout_s: float, known_hosts: Path | None = None) -> Answer:
    """Runs shell text on a host and waits for it; never raises for what happens there."""
    process = subprocess.Popen(
        command(host, known_hosts),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the launcher, not for its connections
    )
    assert process.stdin and process.stdout and process.stderr
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # on this machine, what it has started as well

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        with process, ThreadPoolExecutor(2) as threads:
            kept = [threads.submit(_keep, stream) for stream in (process.stdout, process.stderr)]
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(text.encode())
                process.stdin.close()
        code = process.returncode
    finally:
        timer.cancel()
    if late.is_set():
        return Answer(None, "", f"no answer within {timeout_s:g} s")
    return Answer(code, *(found.result() for found in kept))


def _keep(stream: IO[bytes]) -> str:
    """The beginning of what is said; the rest is read as well, or who says it would wait."""
    kept = stream.read(MAX_ANSWER)
    while stream.read(CHUNK):
        continue
    return kept.decode("utf-8", "replace")


def on_all(items: Sequence[S], action: Callable[[S], T]) -> list[T]:
    """``action`` of every host, or of what stands for it, at once; in their order."""
    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(action, items))
