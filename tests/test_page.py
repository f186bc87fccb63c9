import base64
import subprocess

import jinja2
import numpy as np
import pytest

from tests.evaluate.test_report_images import decode
from vlm import page


def test_what_is_shown_is_one_printable_line_and_not_endless() -> None:
    assert page.clean_text(" a\n\tb\x1b[2J\0\ud800 ") == "a b\ufffd[2J\ufffd\ufffd"
    assert page.clean_text("x" * 501) == "x" * 500 + "\u2026"
    assert page.printable("a\nb\r", keep="\n") == "a\nb\ufffd"


def test_templates_escape_and_refuse_unknown_names() -> None:
    env = page.environment("vlm.evaluate")
    assert env.from_string("{{ x | text }}").render(x="<b>\0") == "&lt;b&gt;\ufffd"
    with pytest.raises(jinja2.UndefinedError):
        env.from_string("{{ y }}").render()


def test_the_hash_is_what_sha256sum_computes() -> None:
    script = "alert(1)\n"
    digest = subprocess.run(
        ["sha256sum"], input=script.encode(), capture_output=True, check=True
    ).stdout[:64]
    assert base64.b64decode(page.csp_hash(script)).hex() == digest.decode()


def test_a_frame_is_a_small_copy_of_itself() -> None:
    frame = np.zeros((240, 320, 3), np.uint8)
    frame[:, :160] = (200, 30, 40)
    frame[:, 160:] = (20, 60, 220)
    shown = np.asarray(decode(page.frame_uri(frame, 10_000))).astype(int)
    assert shown.shape == (120, 160, 3)
    assert np.abs(shown[:, :70] - (200, 30, 40)).max() < 12
    assert np.abs(shown[:, 90:] - (20, 60, 220)).max() < 12


def test_a_small_frame_is_not_blown_up() -> None:
    assert decode(page.frame_uri(np.zeros((30, 20, 3), np.uint8), 10_000)).size == (20, 30)


@pytest.mark.parametrize("max_bytes", [12_000, 6_000, 2_500])
def test_a_frame_keeps_to_its_budget(max_bytes: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), np.uint8)
    uri = page.frame_uri(noise, max_bytes)
    assert len(uri) <= max_bytes * 4 / 3 + 100
    assert min(decode(uri).size) >= 64
