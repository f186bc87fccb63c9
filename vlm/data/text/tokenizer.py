"""Trains a small tokenizer from a data set's own text, for quickstarts and tests.

A byte-level BPE whose turns cost two tokens each, role and end, saved so that ``AutoTokenizer``
loads it. Not here: those of pretrained language models (``vlm.data.text.templates``).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
