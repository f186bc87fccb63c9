"""Memory for the frames of micro-batches, used again once nobody holds them.

Fresh pages cost up to a tenth of what decoding into them costs. Not here: who decodes into it
(``vlm.data.load.loader``).
"""

import math
import weakref
from collections import deque

import numpy as np
import torch

#: slabs that wait to be used again, and the size that theirs is a multiple of
_MAX_FREE = 16
_ROUND_BYTES = 1 << 20


class Slabs:
    """Gives out uint8 tensors.

    Args:
        pinned: Page-locked, for copies to a GPU that nobody waits for; torch keeps those itself.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        # appended to by finalizers, which may run anywhere: a deque needs no lock
        self._free: deque[np.ndarray] = deque(maxlen=_MAX_FREE)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A uint8 tensor with anything in it; its memory comes back when the last view is gone."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        memory = self._find(size)
        view = memory[:size].reshape(shape)
        weakref.finalize(view, self._free.append, memory)
        return torch.from_numpy(view)

    def _find(self, size: int) -> np.ndarray:
        """The first free slab that is large enough; smaller ones go to the end, then away."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if len(memory) >= size:
                return memory
            self._free.append(memory)
        return np.empty(-(-size // _ROUND_BYTES) * _ROUND_BYTES, np.uint8)
