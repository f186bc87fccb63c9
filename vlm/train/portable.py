"""Numbers that JSON does not have, NaN and infinities, as text that ``float`` and CSV readers take.

Not here: files (``vlm.train.metrics``, ``summary``, ``alerts``).
"""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes."""
    return json.dumps(portable(value), indent=indent, allow_nan=False)


def portable(value: Any) -> Any:
    """The same with "nan", "inf" and "-inf" in place of what JSON does not have."""
    if isinstance(value, dict):
        return {name: portable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def revive(value: Any) -> Any:
    """One value of a row that was ``portable``."""
    return float(value) if value in ("nan", "inf", "-inf") else value
