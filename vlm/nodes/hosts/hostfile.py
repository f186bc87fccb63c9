"""The hostfile: which machines, how many processes on each, and how to reach them.

DeepSpeed's grammar, read strictly, with fields of our own behind ``slots`` that DeepSpeed passes
over::

    # a comment
    node-0 slots=8
    10.65.0.3 slots=8 user=root port=2222 addr=10.65.0.3 iface=ens1 key=~/.ssh/id_ed25519

Everything in it ends up in an ssh command, so each field has a pattern that no option and no shell
syntax fits. Not here: where the hosts come from (``vlm.nodes.hosts.discover``), whether they answer
(preflight).
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import ConfigError

MAX_BYTES = 2**20
MAX_SLOTS = 1024
SSH_PORT = 22

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_NUMBER = re.compile(r"[0-9]{1,5}")
#: field -> (what it holds, the pattern of it)
_FIELDS = {
    "slots": (f"a number from 1 to {MAX_SLOTS}", _NUMBER),
    "user": ("a login name", re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")),
    "port": ("a number from 1 to 65535", _NUMBER),
    "addr": ("a host name or an IP address", None),
    "iface": ("a network interface", re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")),
    "key": ("the path of a private key", re.compile(r"[A-Za-z0-9._~/][A-Za-z0-9._~/+@-]{0,1023}")),
}


@dataclass(frozen=True)
class Host:
    """One line.

    Attributes:
        name: what ssh connects to: a host name or an IP address.
        slots: processes to start there, one for each GPU.
        addr: where the other hosts reach it; None: ``name``.
        iface: the network interface that ranks talk over; None: chosen by preflight.
        key: private key for ssh; None: what ssh would use.
    """

    name: str
    slots: int
    user: str | None = None
    port: int = SSH_PORT
    addr: str | None = None
    iface: str | None = None
    key: str | None = None


def read(path: Path) -> list[Host]:
    """The hosts of a file, in its order.

    Raises:
        ConfigError: there is no such file, or a line of it is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"hostfile {path}: {reason}; expected a text file with a line `HOST slots=N` for each "
            "machine (launch/hostfile.py makes one)"
        ) from None
    return parse(text, str(path))


def parse(text: str, where: str) -> list[Host]:
    """The hosts of a hostfile's text.

    Args:
        where: what messages call it.

    Raises:
        ConfigError: with the number of the line.
    """
    hosts: dict[str, int] = {}
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        words = re.split(r"(?:^|\s)#", line.rstrip("\r"), maxsplit=1)[0].split()
        if not words:
            continue
        try:
            host = _host(words)
            if host.name in hosts:
                raise ValueError(f"host {host.name} stands in line {hosts[host.name]} already")
        except ValueError as error:
            raise ConfigError(f"hostfile {where}, line {number}: {error}") from None
        hosts[host.name] = number
        found.append(host)
    if not found:
        raise ConfigError(f"hostfile {where}: names no host; expected lines `HOST slots=N`")
    return found


def to_text(hosts: Sequence[Host]) -> str:
    """A hostfile of these hosts; ``parse`` gives them back.

    Raises:
        ConfigError: a field would not be read back as it is.
    """
    lines = []
    for host in hosts:
        fields = {"slots": host.slots, "user": host.user, "addr": host.addr}
        fields |= {"port": host.port if host.port != SSH_PORT else None}
        fields |= {"iface": host.iface, "key": host.key}
        lines.append(" ".join([host.name, *(f"{k}={v}" for k, v in fields.items() if v)]))
    text = "".join(f"{line}\n" for line in lines)
    if parse(text, "to be written") != list(hosts):
        raise ConfigError(f"hosts {text!r} cannot be written as a hostfile")
    return text


def check_name(text: str) -> str:
    """A host name or an IP address.

    Raises:
        ValueError: it is neither.
    """
    try:
        if "%" not in text:  # a zone may hold anything
            return str(ipaddress.ip_address(text))
    except ValueError:
        if _NAME.fullmatch(text) and ".." not in text:
            return text
    raise ValueError(f"found host {text!r}, expected a host name or an IP address")


def _host(words: list[str]) -> Host:
    name = check_name(words[0])
    fields: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in _FIELDS:
            raise ValueError(f"found {word!r}, expected {', '.join(f'{k}=' for k in _FIELDS)}")
        if key in fields:
            raise ValueError(f"{key}= stands there twice")
        what, pattern = _FIELDS[key]
        if pattern is None:
            value = check_name(value)
        elif not pattern.fullmatch(value):
            raise ValueError(f"found {word!r}, expected {key}= and {what}")
        fields[key] = value
    if not words[1:] or not words[1].startswith("slots="):
        raise ValueError(f"expected slots=N right behind {name}")
    return Host(
        name,
        _in_range("slots", fields["slots"], MAX_SLOTS),
        user=fields.get("user"),
        port=_in_range("port", fields.get("port", str(SSH_PORT)), 65535),
        addr=fields.get("addr"),
        iface=fields.get("iface"),
        key=fields.get("key"),
    )


def _in_range(key: str, text: str, most: int) -> int:
    if not 1 <= int(text) <= most:
        raise ValueError(f"found {key}={text}, expected {_FIELDS[key][0]}")
    return int(text)
