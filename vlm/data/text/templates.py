"""Makes a language model's tokenizer ready for images: a chat template, a place for images, a pad.

A tokenizer that has a chat template keeps it; base models get one of ``TEMPLATES``. Everything
else in the house is then driven by the tokenizer's own template (``vlm.data.text.chat``), and what
was decided lies in its folder, beside the weights it belongs to.

Not here: tokenizers of their own for quickstarts (``vlm.data.text.tokenizer``).
"""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from vlm.data.format.schema import CAPTION_PROMPT
from vlm.data.text import chat
from vlm.errors import ConfigError

#: tokens that tokenizers keep free for this, before one is added
IMAGE_TOKENS = ("<|reserved_special_token_0|>", "<|image|>")
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>")
SYSTEM = (
    "You are an assistant that sees and understands images. Answer with detail, accuracy and care."
)


class Template(NamedTuple):
    """Jinja, with ``SYSTEM`` and ``PROMPT`` where the texts of ``prepare`` go."""

    text: str
    #: of a turn; empty: the tokenizer's own end of text
    end: str


_CHATML = (
    "{% if messages[0]['role'] != 'system' and SYSTEM %}"
    "{{ '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"

TEMPLATES = {
    "llama3": Template(
        "{{ '<|begin_of_text|>' }}"
        "{% if messages[0]['role'] != 'system' and SYSTEM %}{{ "
        + _HEADER.format("'system'")
        + " + SYSTEM + '<|eot_id|>' }}{% endif %}"
        "{% for message in messages %}{{ "
        + _HEADER.format("message['role']")
        + " + message['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + _HEADER.format("'assistant'") + " }}{% endif %}",
        "<|eot_id|>",
    ),
    "chatml": Template(_CHATML, "<|im_end|>"),
    "qwen": Template(_CHATML, "<|im_end|>"),
    # image, caption, end: a question of the data stands before its answer, that of captions does
    # not unless there is a prompt
    "caption": Template(
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}"
        "{% elif CAPTION in message['content'] %}"
        "{{ message['content'].replace(CAPTION, PROMPT) }}"
        "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}",
        "",
    ),
}
#: what a system turn says where the data have none
DEFAULT_SYSTEM = {"llama3": SYSTEM, "qwen": "You are a helpful assistant."}


class Prepared(NamedTuple):
    image_token: str
    image_token_id: int
    pad_token: str
    pad_token_id: int
    #: ends an answer
    end_token: str
    num_tokens: int
    #: tokens that the language model's own weights have no row for
    num_added: int


def prepare(
    source: str | Path,
    output: Path,
    *,
    image_token: str | None = None,
    pad_token: str | None = None,
    template: str | None = None,
    system: str | None = None,
    prompt: str = "",
) -> Prepared:
    """Writes a tokenizer that conversations with images can be encoded with.

    Args:
        source: folder or Hugging Face id.
        image_token: a special token that text never holds; added if it is new. None: the one that
            the tokenizer keeps for it, or a new one.
        pad_token: the same; None: the tokenizer's own unless it ends texts, else as above.
        template: one of ``TEMPLATES``; None: the tokenizer's own.
        system: what a system turn says where the data have none; None: the template's default.
        prompt: of captions, in the template ``caption``.

    Raises:
        ConfigError: no such tokenizer or template, it has none of its own, or the tokens do not
            differ.
    """
    tokenizer = chat.read_tokenizer(source)
    before = len(tokenizer)
    end = tokenizer.eos_token
    if template is not None:
        end = _set_template(tokenizer, template, system, prompt)
    elif not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {source}: has no chat template of its own; name one of "
            f"{', '.join(TEMPLATES)}"
        )
    image = _take(tokenizer, IMAGE_TOKENS if image_token is None else (image_token,))
    pad = tokenizer.pad_token
    if pad_token is not None or pad in (None, tokenizer.eos_token):
        pad = _take(tokenizer, PAD_TOKENS if pad_token is None else (pad_token,))
        tokenizer.pad_token = pad
    if len({image, pad, tokenizer.eos_token}) < 3:
        raise ConfigError(
            f"image token {image!r}, padding token {pad!r} and end of turn "
            f"{tokenizer.eos_token!r}: expected three different tokens"
        )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    chat.load_tokenizer(output, image)
    ids = tokenizer.convert_tokens_to_ids([image, pad])
    return Prepared(image, ids[0], pad, ids[1], end, len(tokenizer), len(tokenizer) - before)


def _set_template(
    tokenizer: PreTrainedTokenizerFast, name: str, system: str | None, prompt: str
) -> str:
    if name not in TEMPLATES:
        raise ConfigError(f"chat template {name!r}: expected one of {', '.join(TEMPLATES)}")
    chosen = TEMPLATES[name]
    says = DEFAULT_SYSTEM.get(name, "") if system is None else system
    values = {"SYSTEM": says, "PROMPT": prompt, "CAPTION": CAPTION_PROMPT}
    sets = "".join(f"{{% set {key} = {_quoted(value)} %}}" for key, value in values.items())
    tokenizer.chat_template = sets + chosen.text
    if chosen.end and chosen.end not in tokenizer.get_vocab():
        raise ConfigError(
            f"chat template {name}: ends turns with {chosen.end}, which tokenizer "
            f"{tokenizer.name_or_path} does not have; take another template"
        )
    if chosen.end:
        tokenizer.eos_token = chosen.end
    if tokenizer.eos_token is None:
        raise ConfigError(f"tokenizer {tokenizer.name_or_path}: has no eos_token to end texts with")
    return tokenizer.eos_token


def _quoted(text: str) -> str:
    """As a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _take(tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...]) -> str:
    """The first of the names that the vocabulary has, as a special token; else adds the last."""
    vocabulary = tokenizer.get_vocab()
    name = next((name for name in names if name in vocabulary), names[-1])
    if name not in chat.special_tokens(tokenizer):
        tokenizer.add_tokens([name], special_tokens=True)
    return name
