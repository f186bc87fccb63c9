"""A tiny tokenizer, trained once for the whole session."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from vlm.data.text import chat
from vlm.data.text.tokenizer import train_tokenizer

IMAGE_TOKEN = "<|image|>"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    texts = ["What colour is the circle?", "red", "The circle is green.", "Describe this."]
    train_tokenizer(texts * 20, path, vocab_size=320, image_token=IMAGE_TOKEN)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> PreTrainedTokenizerFast:
    return chat.load_tokenizer(tokenizer_path, IMAGE_TOKEN)
