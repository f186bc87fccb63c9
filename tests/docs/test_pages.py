"""What pages name is there: links and their headings, files, and flags of commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*")),
]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
FILE = re.compile(r"`((?:vlm|launch|tools|bench|tests|docs|recipes|ds_configs)/[\w/.-]*\w)`")
COMMAND = re.compile(
    r"(?:python|deepspeed|torchrun)\b[^`\n]*?((?:launch|tools|bench)/\w+\.py)([^`\n]*)"
)
#: capital letters stand for any
RECIPE = re.compile(r"((?:recipes|ds_configs)/(?:\w+/)*[a-z]\w*\.(?:yaml|json))")
FLAG = re.compile(r"(?<!\S)--([a-zA-Z][\w-]*)")
#: whose flags are ours: what scripts and the functions that they share say
DECLARED = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("launch", "tools", "bench", "vlm")
    for path in (ROOT / folder).rglob("*.py")
)
LAUNCHER = {"num_gpus", "num_nodes", "hostfile", "include", "exclude", "master_port"}


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def is_declared(flag: str) -> bool:
    """As an argument, or as a field of an adapter's options."""
    name = flag.replace("-", "_")
    return f'"--{flag}"' in DECLARED or f"    {name}: " in DECLARED or flag in LAUNCHER


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, heading in LINK.findall(text):
        target = page.parent / path if path else page
        assert target.exists(), f"link to {path}"
        assert not heading or heading in headings(target), f"link to {path}#{heading}"
    for path in FILE.findall(text):
        assert (ROOT / path).exists() or path.split("/")[1].isupper(), f"file {path}"
    for path in RECIPE.findall(text):
        assert (ROOT / path).exists(), f"file {path}"
    for script, arguments in COMMAND.findall(text):
        assert (ROOT / script).is_file(), f"script {script}"
        unknown = [flag for flag in FLAG.findall(arguments) if not is_declared(flag)]
        assert not unknown, f"{script}: flags {unknown}"
