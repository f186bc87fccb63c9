"""Templates against texts written by hand, on a tokenizer with the tokens of each model."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm.data.format.schema import CAPTION_PROMPT, Turn
from vlm.data.text import chat, templates
from vlm.errors import ConfigError

SPECIAL = {
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "caption": ["<|endoftext|>"],
}
EOS = {"llama3": "<|end_of_text|>"}
TURNS = [
    Turn(role="user", content="<image>What is it?"),
    Turn(role="assistant", content="a ring"),
    Turn(role="user", content="Where?"),
    Turn(role="assistant", content="left"),
]
IMAGE = {"llama3": "<|reserved_special_token_0|>"}
TEXT = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"{templates.SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "<|reserved_special_token_0|>What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[a ring<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[left<|eot_id|>]"
    ),
    "chatml": (
        "<|im_start|>user\n<|image|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n[a ring<|im_end|>]\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|image|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n[a ring<|im_end|>]\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n"
    ),
    "caption": ("<|image|>What is it?\n[a ring<|endoftext|>]Where?\n[left<|endoftext|>]"),
}
each = pytest.mark.parametrize("name", templates.TEMPLATES)


def base_tokenizer(folder: Path, name: str, template: str | None = None) -> Path:
    """Bytes and the special tokens of a model, without a template, as base models have it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    eos = EOS.get(name, "<|endoftext|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token=eos, additional_special_tokens=SPECIAL[name]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def marked(tokenizer: PreTrainedTokenizerFast, encoded: chat.Encoded) -> str:
    """The text with what is learned in brackets."""
    text, inside = "", False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if inside != (label != -100):
            text += "]" if inside else "["
            inside = not inside
        text += tokenizer.decode([token], skip_special_tokens=False)
    return text + ("]" if inside else "")


@each
def test_each_template_says_and_learns_what_it_should(name: str, tmp_path: Path) -> None:
    found = templates.prepare(base_tokenizer(tmp_path / "a", name), tmp_path / "b", template=name)
    assert found.image_token == IMAGE.get(name, "<|image|>")
    tokenizer = chat.load_tokenizer(tmp_path / "b", found.image_token)
    encoded = chat.encode(tokenizer, TURNS, found.image_token)
    assert marked(tokenizer, encoded) == TEXT[name]
    # what is asked for is what stands before the answer
    prompt = chat.encode_prompt(tokenizer, TURNS[:3], found.image_token)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert encoded.labels[len(prompt.input_ids)] != -100
    end = tokenizer.convert_tokens_to_ids(found.end_token)
    assert encoded.labels.count(end) == 2
    assert chat.stop_ids(tokenizer, found.image_token)[0] == end


@each
def test_the_pad_is_its_own(name: str, tmp_path: Path) -> None:
    found = templates.prepare(base_tokenizer(tmp_path / "a", name), tmp_path / "b", template=name)
    tokenizer = chat.load_tokenizer(tmp_path / "b", found.image_token)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, found.image_token_id)
    reserved = name == "llama3"
    assert found.pad_token == ("<|finetune_right_pad_id|>" if reserved else "<pad>")
    assert found.num_added == (0 if reserved else 2)


def test_a_template_of_its_own_stays(tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    templates.prepare(base_tokenizer(tmp_path / "a", "chatml", own), tmp_path / "b")
    assert chat.load_tokenizer(tmp_path / "b", "<|image|>").chat_template == own


@pytest.mark.parametrize("prompt", ["", "A photo of "])
def test_a_caption_is_image_prompt_caption_and_one_end(prompt: str, tmp_path: Path) -> None:
    base = base_tokenizer(tmp_path / "a", "caption")
    templates.prepare(base, tmp_path / "b", template="caption", prompt=prompt)
    tokenizer = chat.load_tokenizer(tmp_path / "b", "<|image|>")
    turns = [
        Turn(role="user", content=CAPTION_PROMPT),
        Turn(role="assistant", content="a red ring"),
    ]
    encoded = chat.encode(tokenizer, turns, "<|image|>")
    assert marked(tokenizer, encoded) == f"{prompt}[a red ring<|endoftext|>]"
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in encoded.input_ids
    expanded = chat.expand_frames(encoded, 1, 4, tokenizer.convert_tokens_to_ids("<|image|>"))
    assert expanded.labels[: 4 + len(prompt)] == [-100] * (4 + len(prompt))


def test_mistakes_are_named(tmp_path: Path) -> None:
    base = base_tokenizer(tmp_path / "a", "caption")
    with pytest.raises(ConfigError, match="no chat template of its own; name one of llama3, chat"):
        templates.prepare(base, tmp_path / "b")
    with pytest.raises(ConfigError, match="ends turns with <|im_end|>, which tokenizer"):
        templates.prepare(base, tmp_path / "b", template="chatml")
    with pytest.raises(ConfigError, match="expected one of llama3"):
        templates.prepare(base, tmp_path / "b", template="llama2")
    with pytest.raises(ConfigError, match="no such folder"):
        templates.prepare(tmp_path / "none", tmp_path / "b")


def test_what_is_said_may_hold_anything(tmp_path: Path) -> None:
    base = base_tokenizer(tmp_path / "a", "qwen")
    says = 'It\'s {{ 1 }} \\ "quoted"\n{% x %}'
    templates.prepare(base, tmp_path / "b", template="qwen", system=says)
    tokenizer = chat.load_tokenizer(tmp_path / "b", "<|image|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{says}<|im_end|>\n<|im_start|>user\nhi")
