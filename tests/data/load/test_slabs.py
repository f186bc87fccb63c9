import gc

import pytest
import torch

from vlm.data.load.slabs import Slabs


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    slabs = Slabs(pinned=False)
    first = slabs.take((3, 4, 4, 3))
    assert first.shape == (3, 4, 4, 3) and first.dtype == torch.uint8
    place = first.data_ptr()
    view = first[1:].permute(0, 3, 1, 2)
    del first
    gc.collect()
    other = slabs.take((3, 4, 4, 3))
    assert other.data_ptr() != place, "a view still holds it"
    del view
    gc.collect()
    assert slabs.take((5, 4, 4, 3)).data_ptr() == place


def test_what_is_held_is_never_shared() -> None:
    slabs = Slabs(pinned=False)
    held = []
    for value in range(40):
        slab = slabs.take((value + 1, 100))
        slab.fill_(value)
        held.append(slab)
        if value % 3 == 0:
            held.pop(0)
    for slab in held:
        assert slab.unique().tolist() == [len(slab) - 1]


def test_a_larger_one_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = Slabs(pinned=False)
    slabs.take((1,))
    assert slabs.take((5 << 20,)).numel() == 5 << 20


def test_soon_none_is_new() -> None:
    """Sizes as they come: once the largest was asked for, what was given out comes back."""
    slabs = Slabs(pinned=False)
    sizes = [(9 << 20) - 1, 1 << 20, 5 << 20, 9 << 20, 3 << 20] * 4
    places = []
    for size in sizes:
        slab = slabs.take((size,))
        places.append(slab.data_ptr())
        del slab
    assert len(set(places[3:])) == 1


@pytest.mark.gpu
def test_pinned_memory() -> None:
    assert Slabs(pinned=True).take((3, 4)).is_pinned()
