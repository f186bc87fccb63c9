from pathlib import Path

from transformers import AutoTokenizer

from tests.data.text.test_templates import base_tokenizer
from tests.tools.run_tool import error_line, run_tool
from vlm.data.text import chat
from vlm.data.text.tokenizer import train_tokenizer


def chat_tokenizer(folder: Path) -> Path:
    """As SmolLM2's is published: it pads with the end of a turn."""
    train_tokenizer(["hello world"] * 5, folder / "made", 300, "<file_sep>")
    tokenizer = AutoTokenizer.from_pretrained(folder / "made")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "published")
    return folder / "published"


def test_tokens_that_are_there_are_named_and_others_added(tmp_path: Path) -> None:
    source = chat_tokenizer(tmp_path)
    size = len(AutoTokenizer.from_pretrained(source))
    for image, pad, num_added in (
        ("<file_sep>", "<|pad|>", 0),
        ("<|image|>", "<|pad|>", 1),
        ("<|image|>", "<|none|>", 2),
    ):
        output = tmp_path / f"out{num_added}"
        arguments = ("--output", output, "--image-token", image, "--pad-token", pad)
        result = run_tool("prepare_tokenizer", source, *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{output}: {num_added} tokens added\n")
        found = chat.load_tokenizer(output, image)
        assert (len(found), found.pad_token) == (size + num_added, pad)
        assert found.convert_tokens_to_ids("<|end|>") == found.eos_token_id
        plain = AutoTokenizer.from_pretrained(source)
        assert found("hello <|user|> x")["input_ids"] == plain("hello <|user|> x")["input_ids"]


def test_an_end_of_turn_is_no_padding(tmp_path: Path) -> None:
    source = chat_tokenizer(tmp_path)
    arguments = ("--output", tmp_path / "out", "--pad-token", "<|end|>")
    assert "expected three different tokens" in error_line(
        run_tool("prepare_tokenizer", source, *arguments)
    )
    assert "no such folder" in error_line(
        run_tool("prepare_tokenizer", "nowhere", "--output", tmp_path / "out")
    )


def test_a_base_tokenizer_gets_a_template(tmp_path: Path) -> None:
    base, output = base_tokenizer(tmp_path / "base", "llama3"), tmp_path / "out"
    missing = run_tool("prepare_tokenizer", base, "--output", output)
    assert "no chat template of its own" in error_line(missing)
    result = run_tool("prepare_tokenizer", base, "--output", output, "--template", "llama3")
    assert result.returncode == 0, result.stderr
    assert "image token <|reserved_special_token_0|>" in result.stdout
    assert "answers end with <|eot_id|>" in result.stdout
    chat.load_tokenizer(output, "<|reserved_special_token_0|>")
