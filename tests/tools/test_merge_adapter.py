from pathlib import Path

import torch
from transformers import AutoModel

from tests.models.test_export import exported, logits
from tests.tools.run_tool import error_line, run_tool


def test_an_export_becomes_a_whole_model(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    (path / "tokenizer.json").write_text("{}")
    result = run_tool("merge_adapter", path, tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("parameters, no adapters\n")
    whole = AutoModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    again = run_tool("merge_adapter", path, tmp_path / "merged")
    assert "is there already; name a new folder" in error_line(again)
    none = run_tool("merge_adapter", tmp_path, tmp_path / "other")
    assert "no config.json there" in error_line(none)
