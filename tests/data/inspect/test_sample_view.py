import itertools
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from transformers import PreTrainedTokenizerFast

from tests.data import clips, helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.format.schema import Preference, Sample, Tokens, Turn
from vlm.data.inspect.sample_view import Branch, Model, SampleView, find_samples

TEXT = {"version": 1, "kind": "text", "source": "s", "frame_count": 0}


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Model:
    return Model(tokenizer=tokenizer, image_token=IMAGE_TOKEN, tokens_per_frame=4)


def one(path: Path, model: Model) -> SampleView:
    (view,) = find_samples([path], model)
    return view


def shown(branch: Branch) -> str:
    """Text with what is learned in brackets and frames counted."""
    marks = {"frames": "{%s}", "learned": "[%s]", "context": "%s"}
    return "".join(
        marks[s.kind] % (len(s.ids) if s.kind == "frames" else s.text) for s in branch.spans
    )


def test_a_sample_is_rendered_masked_and_decoded(tmp_path: Path, model: Model) -> None:
    (path,) = helpers.write_shards(tmp_path, [3])
    view = one(path, model)
    (branch,) = view.branches
    assert shown(branch) == (
        "{12}<|user|>What colour is the circle?<|end|><|assistant|>[red<|end|>]"
    )
    assert (view.key, view.source, view.kind, view.form) == ("00000000", "test", "video", "turns")
    assert (view.shard, view.offset, view.fault) == (path, 0, "")
    jpegs = [body for name, body in helpers.tar_members(path) if name.endswith(".jpg")]
    expected = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])
    np.testing.assert_array_equal(view.frames, expected)


def test_spans_hold_every_token_once(
    tmp_path: Path, model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    (path,) = helpers.write_shards(tmp_path, [0])
    (branch,) = one(path, model).branches
    ids = list(itertools.chain.from_iterable(span.ids for span in branch.spans))
    text = "<|user|>What colour is the circle?<|end|><|assistant|>red<|end|>"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(len(span.ids) == len(span.pieces) for span in branch.spans)
    assert "".join(piece for span in branch.spans for piece in span.pieces) == text
    learned = [span for span in branch.spans if span.kind == "learned"]
    assert branch.num_tokens("learned") == len(learned[0].ids)
    assert branch.num_tokens("learned") + branch.num_tokens("context") == len(ids)


def test_pairs_tokens_and_videos(tmp_path: Path, model: Model) -> None:
    prompt = (Turn(role="user", content="What?"),)
    pair = Preference(prompt=prompt, chosen="red", rejected="blue")
    ids = tuple(model.tokenizer("red blue", add_special_tokens=False)["input_ids"])
    mask = (0,) * (len(ids) - 1) + (1,)
    clip = clips.write_clip(tmp_path / "c.mp4", num_frames=30, fps=10).read_bytes()
    members = [
        ("a.json", Sample(**TEXT, preference=pair).to_json()),
        ("b.json", Sample(**TEXT, tokens=Tokens(token_ids=ids, loss_mask=mask)).to_json()),
        ("c.mp4", clip),
        ("c.txt", b"The circle is green."),
    ]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    a, b, c = find_samples([path], model)
    assert [branch.name for branch in a.branches] == ["chosen", "rejected"]
    assert shown(a.branches[1]).endswith("[blue<|end|>]")
    assert b.branches[0].num_tokens("learned") == 1
    assert c.frames.shape == (3, 224, 224, 3)
    assert shown(c.branches[0]).startswith("{12}<|user|>Describe this.")


def test_what_cannot_be_used_is_shown_with_its_fault(tmp_path: Path, model: Model) -> None:
    special = (Turn(role="user", content="<|end|>"), Turn(role="assistant", content="x"))
    members = [
        ("a.json", b"{}"),
        ("b.json", Sample(**TEXT, turns=special).to_json()),
        ("c.jpg", b"no image"),
        ("c.txt", b"x"),
        ("d.json", helpers.make_sample(0, 0).to_json()),
    ]
    path = helpers.write_tar(tmp_path / "x.tar", members)
    faults = [view.fault for view in find_samples([path], model)]
    assert "nothing to learn" in faults[0]
    assert "special token" in faults[1]
    assert faults[2].startswith("member c.jpg: not a JPEG")
    assert faults[3] == ""


def test_samples_are_chosen(tmp_path: Path, model: Model) -> None:
    paths = helpers.write_shards(tmp_path, [1] * 12, per_shard=5)
    in_order = [view.key for view in find_samples(paths, model)]
    assert in_order == [f"{i:08d}" for i in range(12)]
    drawn = [[v.key for v in find_samples(paths, model, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == in_order != drawn[0]
    chosen = find_samples(paths, model, keys=["00000007", "00000002"])
    assert [view.key for view in chosen] == ["00000002", "00000007"]
    assert list(find_samples(paths, model, source="other")) == []
    assert len(list(find_samples(paths, model, source="test"))) == 12
