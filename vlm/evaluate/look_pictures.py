"""Where a model looked, as pictures to open: a strip and an animation for each clip.

Four panels for every frame: the frame, where the coarse pass looked, where the fine pass looked,
and the difference (red: the fine pass looks there more, blue: less). Names of clips come from
shards, so files are numbered in the order of the report. Not here: measuring
(``vlm.evaluate.attention``).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vlm.evaluate.report_images import clean_attention, heat_colours

#: longest side of a panel, px
SIDE = 128
GAP = 4
LABEL_HEIGHT, LABEL_WIDTH = 14, 44
#: of a strip; more frames are taken evenly
MAX_COLUMNS = 16
FRAME_MS = 600
PANELS = ("frame", "coarse", "fine", "change")
PAPER, INK = (250, 250, 248), (27, 29, 34)
MORE, LESS = (214, 39, 40), (31, 99, 190)


def write_pictures(
    folder: Path,
    number: int,
    frames: Sequence[np.ndarray],
    coarse: Sequence[np.ndarray],
    fine: Sequence[np.ndarray],
) -> None:
    """Writes ``clip_NN.png``, a column for each frame, and ``clip_NN.gif``, frame after frame.

    Args:
        frames: (H, W, 3) uint8 each.
        coarse: (gh, gw) each, attention of the static query; ``fine`` of each frame's own.
    """
    shown = [
        panels(frame, glance, look)
        for frame, glance, look in zip(frames, coarse, fine, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    few = np.unique(np.linspace(0, len(shown) - 1, MAX_COLUMNS).round().astype(int))
    _strip([shown[i] for i in few], few.tolist()).save(folder / f"clip_{number:02d}.png")
    first, *rest = [_row(four) for four in shown]
    first.save(
        folder / f"clip_{number:02d}.gif",
        save_all=True,
        append_images=rest,
        duration=FRAME_MS,
        loop=0,
    )


def panels(frame: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> list[Image.Image]:
    """The four panels of one frame, all of one size."""
    image = Image.fromarray(frame)
    scale = SIDE / max(image.size)
    plain = image.resize((round(image.width * scale), round(image.height * scale)))
    layers = (heat_colours(coarse), heat_colours(fine), change_colours(coarse, fine))
    return [plain, *(_over(plain, colours) for colours in layers)]


def change_colours(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """(gh, gw, 4) uint8: red where the fine pass looks more, blue where less, clear where alike."""
    change = clean_attention(fine) - clean_attention(coarse)
    share = np.abs(change) / (np.abs(change).max() or 1.0)
    colours = np.where((change > 0)[..., None], MORE, LESS)
    return np.concatenate([colours, (220 * share)[..., None]], axis=-1).round().astype(np.uint8)


def _over(plain: Image.Image, colours: np.ndarray) -> Image.Image:
    """Cells of one colour each over a picture, hard-edged."""
    layer = Image.fromarray(colours).resize(plain.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(plain.convert("RGBA"), layer).convert("RGB")


def _strip(columns: Sequence[Sequence[Image.Image]], indices: Sequence[int]) -> Image.Image:
    """A row for each kind of panel, a column for each frame."""
    width, height = columns[0][0].size
    size = (
        LABEL_WIDTH + len(columns) * (width + GAP),
        LABEL_HEIGHT + len(PANELS) * (height + GAP),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(PANELS):
        draw.text((2, LABEL_HEIGHT + row * (height + GAP) + height // 2 - 6), name, fill=INK)
    for column, (four, index) in enumerate(zip(columns, indices, strict=True)):
        x = LABEL_WIDTH + column * (width + GAP)
        draw.text((x, 1), str(index), fill=INK)
        for row, panel in enumerate(four):
            sheet.paste(panel, (x, LABEL_HEIGHT + row * (height + GAP)))
    return sheet


def _row(four: Sequence[Image.Image]) -> Image.Image:
    """The panels side by side, each under its name."""
    width, height = four[0].size
    sheet = Image.new("RGB", (len(four) * (width + GAP) - GAP, LABEL_HEIGHT + height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (name, panel) in enumerate(zip(PANELS, four, strict=True)):
        draw.text((column * (width + GAP) + 2, 1), name, fill=INK)
        sheet.paste(panel, (column * (width + GAP), LABEL_HEIGHT))
    return sheet
