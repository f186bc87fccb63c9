"""A tokenizer and a collator of the small world, made once."""

from pathlib import Path

import pytest

from tests.evaluate.world import make_collator, make_tokenizer
from vlm.data.load.collate import Collator


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("world") / "tokenizer")


@pytest.fixture(scope="session")
def collator(tokenizer_path: Path) -> Collator:
    return make_collator(tokenizer_path)
