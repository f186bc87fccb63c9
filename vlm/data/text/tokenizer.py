"""Tokenizers for training: a pretrained one with what conversations with frames need, or a new one.

``prepare_tokenizer`` names the image token and a padding token of a pretrained language model's.
``train_tokenizer`` makes a small one from a data set's own text, for quickstarts and tests: a
byte-level BPE whose turns cost two tokens each, role and end. Not here: encoding
(``vlm.data.text.chat``).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm.data.text import chat
from vlm.errors import ConfigError

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int, image_token: str) -> None:
    """Trains on ``texts`` and saves to the folder ``path``.

    Raises:
        ConfigError: ``vocab_size`` cannot hold the 256 bytes and the special tokens.
    """
    special = [PAD, END, *ROLES, image_token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ConfigError(
            f"vocab_size {vocab_size}: a byte-level tokenizer needs at least "
            f"{len(alphabet) + len(special)} entries"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[*ROLES, image_token],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    path.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(path)


def prepare_tokenizer(source: str | Path, path: Path, image_token: str, pad_token: str) -> int:
    """Saves a tokenizer as ``chat.load_tokenizer`` wants it to the folder ``path``.

    Both tokens may be special tokens that it has and text never holds; others are added, and the
    language model gets a row for each.

    Returns:
        How many were added.

    Raises:
        ConfigError: no such tokenizer, one without a chat template, or the tokens do not differ.
    """
    tokenizer = chat.read_tokenizer(source)
    if len({image_token, pad_token, tokenizer.eos_token}) < 3:
        raise ConfigError(
            f"image token {image_token!r}, padding token {pad_token!r} and end of turn "
            f"{tokenizer.eos_token!r}: expected three different tokens"
        )
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": pad_token})
    if image_token not in chat.special_tokens(tokenizer):
        tokenizer.add_tokens([AddedToken(image_token, special=True)], special_tokens=True)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    chat.load_tokenizer(path, image_token)
    return len(tokenizer) - before
