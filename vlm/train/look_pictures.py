"""Where a model looked, as pictures to open: a strip and an animation for each clip.

Panels for every frame: the frame, where the coarse pass looked, where the fine pass looked, and the
difference (red: the fine pass looks there more, blue: less); the first two where there was no fine
pass. Names of clips come from shards, so files are numbered. Not here: measuring
(``vlm.train.held_out_looks``).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

#: longest side of a panel, px
SIDE = 128
GAP = 4
LABEL_HEIGHT, LABEL_WIDTH = 14, 44
#: of a clip that are shown; of more, these are taken evenly
MAX_FRAMES = 16
FRAME_MS = 600
PANELS = ("frame", "coarse", "fine", "change")
PAPER, INK = (250, 250, 248), (27, 29, 34)
MORE, LESS = (214, 39, 40), (31, 99, 190)
#: attention from none to most, as red, green, blue, opacity: the dark dims what nobody looked at
HEAT = np.array(
    [
        (8, 6, 26, 105),
        (87, 16, 110, 115),
        (188, 55, 84, 125),
        (249, 142, 9, 140),
        (252, 255, 164, 155),
    ],
    dtype=np.float64,
)


class Seen(NamedTuple):
    """A clip, and where a model looked in it."""

    #: (T, H, W, 3) uint8
    frames: np.ndarray
    #: (T, gh, gw) attention of the static query
    coarse: np.ndarray
    #: the same of each frame's own; None where there was no fine pass
    fine: np.ndarray | None


def write_pictures(folder: Path, clips: Iterable[Seen]) -> None:
    """Writes ``clip_NN.png``, a column for each frame, and ``clip_NN.gif``, frame after frame.

    Those of an earlier call are gone.

    Raises:
        OSError: the folder cannot be written.
    """
    for old in [*folder.glob("clip_*.png"), *folder.glob("clip_*.gif")]:
        old.unlink()
    for number, clip in enumerate(clips):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"clip_{number:02d}", clip)


def _write(path: Path, clip: Seen) -> None:
    some = np.unique(np.linspace(0, len(clip.frames) - 1, MAX_FRAMES).round().astype(int)).tolist()
    shown = {
        t: panels(clip.frames[t], clip.coarse[t], None if clip.fine is None else clip.fine[t])
        for t in some
    }
    _strip(shown).save(path.with_suffix(".png"))
    first, *rest = [_row(panels) for panels in shown.values()]
    first.save(
        path.with_suffix(".gif"), save_all=True, append_images=rest, duration=FRAME_MS, loop=0
    )


def panels(frame: np.ndarray, coarse: np.ndarray, fine: np.ndarray | None) -> list[Image.Image]:
    """The panels of one frame, all of one size."""
    image = Image.fromarray(frame)
    scale = SIDE / max(image.size)
    plain = image.resize((round(image.width * scale), round(image.height * scale)))
    layers = [heat_colours(coarse)]
    if fine is not None:
        layers += [heat_colours(fine), change_colours(coarse, fine)]
    return [plain, *(_over(plain, colours) for colours in layers)]


def heat_colours(attention: np.ndarray) -> np.ndarray:
    """(gh, gw) -> (gh, gw, 4) uint8, scaled to the strongest cell."""
    weights = clean_attention(attention)
    share = weights / (weights.max() or 1.0)
    steps = np.linspace(0, 1, len(HEAT))
    rgba = np.stack([np.interp(share, steps, channel) for channel in HEAT.T], axis=-1)
    return rgba.round().astype(np.uint8)


def change_colours(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """(gh, gw, 4) uint8: red where the fine pass looks more, blue where less, clear where alike."""
    change = clean_attention(fine) - clean_attention(coarse)
    share = np.abs(change) / (np.abs(change).max() or 1.0)
    colours = np.where((change > 0)[..., None], MORE, LESS)
    return np.concatenate([colours, (220 * share)[..., None]], axis=-1).round().astype(np.uint8)


def clean_attention(attention: np.ndarray) -> np.ndarray:
    """As float64, with zero for what is not a positive finite number."""
    weights = np.nan_to_num(np.asarray(attention, dtype=np.float64), nan=0.0, posinf=0.0)
    return np.clip(weights, 0.0, None)


def _over(plain: Image.Image, colours: np.ndarray) -> Image.Image:
    """Cells of one colour each over a picture, hard-edged."""
    layer = Image.fromarray(colours).resize(plain.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(plain.convert("RGBA"), layer).convert("RGB")


def _strip(columns: dict[int, list[Image.Image]]) -> Image.Image:
    """A row for each kind of panel, a column for each frame, by its number."""
    first = next(iter(columns.values()))
    (width, height), rows = first[0].size, len(first)
    size = (
        LABEL_WIDTH + len(columns) * (width + GAP),
        LABEL_HEIGHT + rows * (height + GAP),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(PANELS[:rows]):
        draw.text((2, LABEL_HEIGHT + row * (height + GAP) + height // 2 - 6), name, fill=INK)
    for column, (index, shown) in enumerate(columns.items()):
        x = LABEL_WIDTH + column * (width + GAP)
        draw.text((x, 1), str(index), fill=INK)
        for row, panel in enumerate(shown):
            sheet.paste(panel, (x, LABEL_HEIGHT + row * (height + GAP)))
    return sheet


def _row(shown: Sequence[Image.Image]) -> Image.Image:
    """The panels side by side, each under its name, in 256 colours."""
    width, height = shown[0].size
    sheet = Image.new("RGB", (len(shown) * (width + GAP) - GAP, LABEL_HEIGHT + height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (name, panel) in enumerate(zip(PANELS, shown, strict=False)):
        draw.text((column * (width + GAP) + 2, 1), name, fill=INK)
        sheet.paste(panel, (column * (width + GAP), LABEL_HEIGHT))
    # Pillow's own choice for a GIF, median cut, takes half a second a frame and is little better
    return sheet.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
