"""Stage 1 and stage 2 as runs: adapters over a 4-bit base, trained by DeepSpeed on two ranks."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import ranks
from tests.models.tiny import CLIP, PERCEIVER, make_lm
from tests.train import helpers, runs
from vlm.ckpt.save import MODEL
from vlm.models import registry
from vlm.models.export import ADAPTER
from vlm.train.metrics import read_rows

SEVEN = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


def overrides(base: Path, quantize: str = "nf4") -> list[str]:
    return [
        "model.family=perceiver",
        f"model.vision={{config: {CLIP}}}",
        f"model.connector={PERCEIVER}",
        f"model.language={{pretrained: '{base}', quantize: {quantize}}}",
        f"model.language.lora={{rank: 4, targets: {SEVEN}}}",
        "model.freeze=[vision]",
        "data.budget=400",
        "optim.lr={connector: 5.0e-3, language: 5.0e-3}",
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model that both stages stand on."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    make_lm(hidden_size=64, intermediate_size=128, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "stage"), [("nf4", 2), ("null", 3)])
def test_adapters_train_stop_and_go_on(base: Path, quantize: str, stage: int) -> None:
    """On 4-bit weights, and on weights that ZeRO-3 shares out."""
    whole = helpers.recipe(runs.new_folder(), *overrides(base, quantize))
    steps = ranks(2).run(runs.fit, whole, stage)
    losses = [step.result.losses["loss"] for step in steps[0]]
    assert losses[-1] < losses[0]
    path = runs.checkpoint(whole, helpers.STEPS) / MODEL
    assert (path / ADAPTER / "adapter_model.safetensors").is_file()
    model = registry.load(path)
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and float(p.abs().max()) > 0]
    assert len(moved) == 14  # B starts at zero

    shutil.rmtree(runs.checkpoint(whole, helpers.STEPS))
    rows = [row for row in read_rows(whole.output_dir / "metrics.jsonl") if row["event"] == "train"]
    again = ranks(2).run(runs.fit, whole, stage)
    assert again == [own[helpers.EVERY :] for own in steps]
    now = [row for row in read_rows(whole.output_dir / "metrics.jsonl") if row["event"] == "train"]
    assert [row["loss"] for row in now] == [row["loss"] for row in rows]
