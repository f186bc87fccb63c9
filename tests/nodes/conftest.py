from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import sshd


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Nodes]:
    """Three hosts that answer."""
    with sshd.nodes(Path(tmp_path_factory.mktemp("nodes")) / "ssh", 3) as started:
        yield started


@pytest.fixture(scope="session")
def pair(nodes: sshd.Nodes) -> sshd.Nodes:
    """The first two of them."""
    return sshd.Nodes(nodes.folder, nodes.nodes[:2])
