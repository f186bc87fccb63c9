"""Memory for the frames of micro-batches, used again once nobody holds them.

Fresh pages cost up to a tenth of what decoding into them costs, so all slabs soon have the size of
the largest that was ever asked for, and any of them will do. Not here: who decodes into it
(``vlm.data.load.loader``).
"""

import math
import weakref
from collections import deque

import numpy as np
import torch

#: slabs that wait to be used again
_MAX_FREE = 16
#: sizes are a multiple of it: that of a huge page
_ROUND_BYTES = 2 << 20


class Slabs:
    """Gives out uint8 tensors.

    Args:
        pinned: Page-locked, for copies to a GPU that nobody waits for; torch keeps those itself.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        # appended to by finalizers, which may run anywhere: a deque needs no lock
        self._free: deque[np.ndarray] = deque(maxlen=_MAX_FREE)
        self._largest = 0

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
        """A free slab that is large enough; those that are too small for it are let go."""
        self._largest = max(self._largest, -(-size // _ROUND_BYTES) * _ROUND_BYTES)
        while True:
            try:
                memory = self._free.popleft()
            except IndexError:
                return np.empty(self._largest, np.uint8)
            if len(memory) >= size:
                return memory
