from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vlm.data.text.chat import tokenizer_fingerprint
from vlm.data.text.tokenizer import train_tokenizer
from vlm.errors import ConfigError


def test_it_is_lossless_and_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer(["hello world"] * 5, tmp_path / name, 300, "<|image|>")
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = " Gr\u00fc\u00dfe \U0001f534\n\thello  world"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token != tokenizer.eos_token == "<|end|>"


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 262"):
        train_tokenizer(["x"], tmp_path, 261, "<|image|>")
