"""A few held-out samples, the same ones at every evaluation of a run."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from vlm.data.load.reader import LoadedSample, Reader
from vlm.data.plan.catalog import Catalog
from vlm.errors import SampleError, TransientError, one_line

log = logging.getLogger(__name__)


def choose(usable: np.ndarray, count: int) -> list[int]:
    """Up to ``count`` rows, evenly spaced among those at which ``usable`` (rows,) is True."""
    rows = np.flatnonzero(usable)
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=np.int64)
    return rows[places].tolist()


def read(
    catalog: Catalog, rows: Sequence[int], latent_shape: tuple[int, int, int] | None = None
) -> Iterator[tuple[str, LoadedSample | None]]:
    """(key, sample) of each row; None, with a warning, for one that is bad or out of reach."""
    with closing(Reader(catalog)) as reader:
        for row, key in zip(rows, catalog.keys(rows), strict=True):
            try:
                yield key, reader.read(row, latent_shape)
            except (SampleError, TransientError) as error:
                log.warning("held-out sample left out: %s", one_line(error))
                yield key, None
