"""Ports for servers of tests."""

import random
import socket

#: below what systems give to whoever asks for any port: nobody gets it before it is used
PORTS = range(10_000, 32_000)
_ANY = random.SystemRandom()  # not the global generator, which tests seed


def free_port() -> int:
    """One that nobody listens on, at any address of this machine."""
    while True:
        port = _ANY.choice(PORTS)
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:  # somebody does
            continue
