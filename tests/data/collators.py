"""The collator that tests of loading begin with."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.data.conftest import IMAGE_TOKEN
from vlm.config import AugmentConfig
from vlm.data.load.collate import Collator


def make_collator(tokenizer: PreTrainedTokenizerFast, seed: int, **changes: Any) -> Collator:
    values = {
        "tokenizer": tokenizer,
        "image_token": IMAGE_TOKEN,
        "tokens_per_frame": 1,
        "loss_on": "answers",
        "augment": AugmentConfig(),
    }
    return Collator(**(values | changes), seed=seed)
