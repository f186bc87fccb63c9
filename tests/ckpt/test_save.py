import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.ckpt.test_load import make_checkpoint
from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.ckpt import save
from vlm.data.plan import Position
from vlm.engine.step import eval_step
from vlm.models import registry
from vlm.train import data

RANK_FILES = {
    2: ["mp_rank_00_model_states.pt", "rank_00000.pt", "rank_00001.pt"]
    + [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)],
    3: ["rank_00000.pt", "rank_00001.pt"]
    + [
        f"zero_pp_rank_{r}_mp_rank_00_{kind}_states.pt"
        for r in (0, 1)
        for kind in ("model", "optim")
    ],
}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_holds_what_the_documentation_says(stage: int) -> None:
    recipe = runs.whole(stage).recipe
    folder = recipe.output_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000003", "step_00000006"]
    assert (folder / "latest").read_text() == "step_00000006"
    path = runs.checkpoint(recipe, helpers.STEPS)
    files = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    ours = ["COMPLETE", "manifest.json", "trainer.json"]
    model = [name for name in files if name.startswith("model/")]
    assert sorted(files) == sorted([*ours, *RANK_FILES[stage], *model])
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= {*model}
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == sorted({*files} - {"COMPLETE", "manifest.json"})
    for name, entry in manifest.items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_state_counts_what_ran() -> None:
    whole = runs.whole(2)
    trainer = json.loads((runs.checkpoint(whole.recipe, 3) / "trainer.json").read_text())
    steps = [step for rank in whole.steps for step in rank[:3]]
    assert trainer["state"]["step"] == 3
    assert trainer["state"]["samples_seen"] == sum(len(keys) for s in steps for keys in s.keys)
    assert trainer["state"]["wall_s"] > 0
    assert trainer["identity"]["world_size"] == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_the_exported_model_is_the_engines(stage: int) -> None:
    """Without DeepSpeed, from another process: the same losses on the same samples."""
    recipe = runs.whole(stage).recipe
    found = ranks(2).run(runs.evaluate, recipe, stage)
    model = registry.load(runs.checkpoint(recipe, helpers.STEPS) / "model").eval()
    tokenizer = data.load_tokenizer(recipe)
    source = data.open_source(recipe, tokenizer, training=False)
    for rank, (sums, tokens) in enumerate(found):
        loaded = next(data.steps(source, recipe, rank, 2, Position()))
        expected, num_tokens = eval_step(Plain(model), loaded.batches)
        assert tokens == num_tokens
        assert sums == pytest.approx(expected, rel=1e-6)


class Plain:
    """What ``eval_step`` needs of an engine."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


def test_the_exported_tokenizer_is_the_one_of_the_recipe() -> None:
    recipe = runs.whole(2).recipe
    exported = runs.checkpoint(recipe, helpers.STEPS) / "model"
    other = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"tokenizer": str(exported)})}
    )
    turns = [{"role": "user", "content": "What colour?"}]
    first, second = (data.load_tokenizer(r).apply_chat_template(turns) for r in (recipe, other))
    assert first["input_ids"] == second["input_ids"]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_prune_keeps_the_newest_and_clears_what_kills_left(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_00000020" / save.COMPLETE).unlink()  # killed while it was pruned
    make_checkpoint(tmp_path, 35).rename(tmp_path / "step_00000035.tmp")
    (tmp_path / "latest").write_text("step_00000040")
    save.prune(tmp_path, "step_00000040", 2)
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000040"]
    save.prune(tmp_path, "step_00000040", 9)
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000040"]


def test_prune_never_takes_the_one_just_saved(tmp_path: Path) -> None:
    """Step 40 was damaged, so the run went on from 20 and has now saved 25."""
    for step in (20, 25, 40):
        make_checkpoint(tmp_path, step)
    save.prune(tmp_path, "step_00000025", 1)
    assert names(tmp_path) == ["step_00000025"]


def test_a_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    save.replace_text(path, "old")
    save.replace_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["recipe.yaml"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save.replace_text(path, "newer")
    assert path.read_text() == "new"
