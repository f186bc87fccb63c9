from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import sshd


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Nodes]:
    """Three hosts that answer."""
    with sshd.nodes(Path(tmp_path_factory.mktemp("nodes")) / "ssh", 3) as started:
        yield started
