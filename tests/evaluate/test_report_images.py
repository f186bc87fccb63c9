import base64
import io

import numpy as np
import pytest
from PIL import Image

from vlm.evaluate.report_images import heat_uri, peak


def decode(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format is not None
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def test_heat_is_brightest_where_attention_is() -> None:
    attention = np.full((5, 7), 0.01)
    attention[3, 1] = 0.9
    heat = np.asarray(decode(heat_uri(attention))).astype(int)
    assert heat.shape == (5, 7, 4)
    light = heat[..., :3].sum(axis=-1)
    assert np.unravel_index(light.argmax(), light.shape) == (3, 1)
    assert light[0, 0] < light[3, 1] / 4
    assert heat[..., 3].max() < 200, "the frame stays visible below"


def test_more_attention_is_never_darker() -> None:
    ramp = np.asarray(decode(heat_uri(np.linspace(0, 1, 64)[None]))).astype(int)
    light = ramp[0, :, :3] @ [2126, 7152, 722]
    assert (np.diff(light) >= 0).all()


@pytest.mark.parametrize(
    "attention",
    [
        np.zeros((3, 3)),
        np.full((3, 3), np.nan),
        np.array([[np.inf, -1.0], [np.nan, 0.5]]),
        np.ones((1, 1), np.float16),
    ],
)
def test_odd_attention_is_still_an_image(attention: np.ndarray) -> None:
    assert decode(heat_uri(attention)).size == attention.shape[::-1]
    assert np.isfinite(peak(attention))


def test_peak_counts_even_shares() -> None:
    assert peak(np.full((4, 4), 0.3)) == pytest.approx(1.0)
    focused = np.zeros((4, 4))
    focused[0, 0] = 0.2
    assert peak(focused) == pytest.approx(16.0)
    assert peak(np.zeros((4, 4))) == 0.0
