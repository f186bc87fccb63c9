"""The adapters there are: a line each, with the data set's licence, options and place on the hub.

The names are the sub-commands of ``tools/precompute.py``. Not here: what an adapter is
(`vlm.data.adapters.base`).
"""

from vlm.data.adapters import video
from vlm.data.adapters.base import Adapter

ADAPTERS: dict[str, Adapter] = {
    "video": Adapter(
        annotations=video.annotations,
        options=video.Options,
        licence="",
        help="your own files of videos or images and text (JSON lines, JSON, CSV)",
    ),
}
