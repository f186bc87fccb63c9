"""Which variables a job's ranks have: by an allow-list, by an env file, by name; no other secret.

Not here: how they travel (``vlm.nodes.agent.agent``: as values on ssh's standard input).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlm.errors import ConfigError

MAX_BYTES = 2**20
#: taken along from where the launcher runs
NAMES = frozenset(
    {
        "DEEPSPEED_TIMEOUT",
        "DS_ACCELERATOR",
        "HF_HOME",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
        "TORCH_EXTENSIONS_DIR",
        "TRITON_CACHE_DIR",
    }
)
PREFIXES = ("AWS_", "GLOO_", "HF_", "NCCL_", "TORCH_", "UCX_", "WANDB_")
#: what a variable is called whose value nobody may see
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
#: shorter values would hide half of a log
MIN_SECRET = 6
HIDDEN = "***"


def allowed(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the launcher's own environment its ranks get."""
    return {k: v for k, v in environ.items() if k in NAMES or k.startswith(PREFIXES)}


def for_ranks(environ: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """A host's environment for its ranks: its secrets stay behind unless they are on the list."""
    own = {k: v for k, v in environ.items() if not is_secret(k)}
    return {**own, **allowed(environ), **given}


def collect(
    environ: Mapping[str, str], file: Path | None, assignments: Sequence[str]
) -> dict[str, str]:
    """The list's variables, then those of an env file, then ``NAME=VALUE`` or ``NAME``.

    Raises:
        ConfigError: one of them cannot be read, or is not set.
    """
    found = allowed(environ)
    if file is not None:
        found |= parse(_read(file), str(file))
    for text in assignments:
        name, equals, value = text.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--env: found {text!r}, expected NAME=VALUE or NAME")
        if not equals and name not in environ:
            raise ConfigError(f"--env {name}: there is no such variable here; say {name}=VALUE")
        found[name] = value if equals else environ[name]
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"env file {path}: {error}; expected lines NAME=VALUE, comments behind #"
        ) from None


def parse(text: str, where: str) -> dict[str, str]:
    """``NAME=VALUE`` lines; a value is taken as it stands, quotes and ``$`` included.

    Raises:
        ConfigError: with the number of the line, never with its value.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"env file {where}, line {number}: expected NAME=VALUE")
        if name in found:
            raise ConfigError(f"env file {where}, line {number}: {name} stands there twice")
        found[name] = value
    return found


def is_secret(name: str) -> bool:
    return name not in NAMES and _SECRET.search(name) is not None


def secrets(env: Mapping[str, str]) -> list[str]:
    """Values that must not be shown, longest first."""
    found = {v for k, v in env.items() if is_secret(k) and len(v) >= MIN_SECRET}
    return sorted(found, key=len, reverse=True)


def hide(text: str, hidden: Iterable[str]) -> str:
    for value in hidden:
        text = text.replace(value, HIDDEN)
    return text
