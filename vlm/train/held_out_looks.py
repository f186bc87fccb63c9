"""Where a foveated model looks in a few held-out samples, drawn at each evaluation of a run.

1. The same samples every time, each by itself, so that memory that trains suffices.
2. All ranks call the model equally often, as ZeRO-3 needs; rank 0 draws its own.
3. Nothing of it enters the run: no random number, no figure. Pictures that cannot be written are
   left out with a warning that says why, for what a run needs of its disk says so itself.

Not here: how pictures are drawn (``vlm.train.look_pictures``).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlm.batch import IGNORE_INDEX, Batch
from vlm.ckpt.keep import folder_name
from vlm.data.load.collate import Collator
from vlm.data.load.reader import LoadedSample
from vlm.data.text.chat import Encoded
from vlm.engine.modes import only_mode
from vlm.errors import SampleError, one_line
from vlm.models.foveated import FoveatedModel
from vlm.train import held_out
from vlm.train.look_pictures import Seen, write_pictures
from vlm.train.run import Run

log = logging.getLogger(__name__)

#: folder of a run
ATTENTION = "attention"


def draw(run: Run, step: int) -> None:
    """Draws ``train.eval_pictures`` samples of a model that looks. All ranks together."""
    if not isinstance(run.engine.module, FoveatedModel):
        return
    config = run.recipe.train
    rows = held_out.choose(run.eval.catalog.num_frames > 0, config.eval_pictures)
    mode, clips = only_mode(run.recipe), []
    run.engine.eval()
    for frames, batch in _batches(run, rows):
        maps = look(run.engine, batch, mode)
        if frames is not None:
            clips.append(Seen(frames, maps["coarse"], maps.get("fine")))
    run.engine.train()
    if run.machine.rank == 0:
        folder = run.recipe.output_dir / ATTENTION / folder_name(step)
        try:
            write_pictures(folder, clips)
        except OSError as error:
            log.warning("%s: %s; pictures of step %d are left out", folder, error.strerror, step)


@torch.no_grad()
def look(model: Any, batch: Batch, mode: str | None = None) -> Mapping[str, np.ndarray]:
    """``Output.maps`` of a model or an engine; ``mode`` None: its own."""
    options: dict[str, Any] = {"measure_all": True}
    options |= {} if mode is None else {"mode": mode}
    maps = model(batch.to(model.device), **options).maps
    return {name: found.cpu().numpy() for name, found in maps.items()}


def whole(collator: Collator, key: str, loaded: LoadedSample, question_first: bool) -> Batch:
    """A sample with all its text, of a pair the chosen answer.

    Raises:
        SampleError: its text does not fit the recipe; without the sample's name.
    """
    frames = loaded.frames
    encoded, *_ = collator.encode_branches(
        loaded.sample, len(frames), question_first=question_first
    )
    size = frames.shape[1], frames.shape[2]
    return collator.batch([frames], [encoded], [key], "video", size, [loaded.latents])


def _batches(run: Run, rows: Sequence[int]) -> Iterator[tuple[np.ndarray | None, Batch]]:
    """Each row's frames and batch; None and a blank batch for one that this rank cannot show.

    Other ranks may, and would wait for this one.
    """
    catalog, collator = run.eval.catalog, run.eval.collator
    question_first = run.recipe.data.orders[0] == "question_first"
    samples = held_out.read(catalog, rows, collator.latent_shape)
    for row, (key, loaded) in zip(rows, samples, strict=True):
        if loaded is not None:
            try:
                yield loaded.frames, whole(collator, key, loaded, question_first)
                continue
            except SampleError as error:
                log.warning("held-out sample %r left out: %s", key, one_line(error))
        yield None, blank(collator, (int(catalog.height[row]), int(catalog.width[row])))


def blank(collator: Collator, size: tuple[int, int]) -> Batch:
    """One token, and a frame of (H, W) that nobody owns, with a latent if frames have one."""
    shape, no_frames = collator.latent_shape, np.zeros((0, *size, 3), np.uint8)
    latents = None if shape is None else np.zeros((1, *shape), np.float16)
    token = Encoded([collator.tokenizer.eos_token_id], [IGNORE_INDEX])
    return collator.batch([no_frames], [token], ["blank"], "text", size, [latents])
