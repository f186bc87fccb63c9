"""Ports for servers of tests."""

import socket


def free_port() -> int:
    """One that nobody listens on, at any address of this machine."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
