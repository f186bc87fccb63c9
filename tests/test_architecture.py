"""The rules of the house that no linter knows: who may import whom, and what code may not do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAX_LINES = 400

#: Layer of what stands above the library
SCRIPTS = ("launch", "tools")

#: Packages with layers of their own: package -> the lowest one
WITHIN = {"data": "pool", "nodes": "hosts"}

#: Modules that plan batches; no torch and no I/O reaches them
PURE = {
    "vlm.data.plan.bucket",
    "vlm.data.plan.mixture",
    "vlm.data.plan.pack",
    "vlm.data.plan.plan",
    "vlm.data.plan.policy",
    "vlm.data.plan.position",
    "vlm.data.plan.shares",
    "vlm.data.plan.spare",
    "vlm.data.plan.stream",
}

#: Files without a test file of their own: path -> where they are tested, or why they need not be
UNTESTED = {
    "vlm/train/run.py": "every run of tests/train and tests/ckpt is built by it",
    "vlm/train/views.py": "tests/train/test_metrics.py looks at what they show",
    "vlm/train/watch.py": "tests/train/test_loop.py and test_incidents.py read what it writes",
    "vlm/nodes/agent/agent.py": "tests/nodes/launcher/test_supervise.py starts it on ssh servers",
    "vlm/nodes/agent/watch.py": "the same",
    "vlm/nodes/launcher/connection.py": "the same",
    "vlm/train/arguments.py": "tests/launch/test_train.py and test_run.py",
    "vlm/train/hosts.py": "tests/launch/test_preflight.py and test_run.py",
    "vlm/autoencoder.py": "tests/data/format/test_latents.py and tests/models/test_latent.py",
    "vlm/config_model.py": "a section of what tests/test_config.py tests",
    "vlm/config_optim.py": "a section of what tests/test_config.py tests",
    "vlm/config_train.py": "sections of what tests/test_config.py tests",
    "vlm/dist.py": "tests/engine and tests/train run it on two ranks",
    "launch/predict_frames.py": "tests/evaluate/test_next_frames.py runs it",
    "launch/predict_patches.py": "tests/evaluate/test_patch_prediction.py runs it",
    "vlm/log.py": "a format string and a filter",
    "vlm/models/flops/measured.py": "tests/models/flops/test_counters.py holds it to what is run",
    "vlm/models/family.py": "a return type and configurations; all tests of families use them",
}

#: Calls that a module may make when it is imported: name -> why
AT_IMPORT = {
    "AutoConfig.register": "transformers finds a class of ours only once it is registered",
    "AutoModel.register": "the same",
}


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the project: what git tracks, else (an unpacked archive) what lies there."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        paths = [Path(name) for name in listing.split("\0") if name]
    else:
        paths = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file()]
    return tuple(path for path in paths if (ROOT / path).is_file())


def sources(*folders: str) -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.parts[0] in folders]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources("vlm")}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    package = path.parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the library that a file imports."""
    found = {name for name in imports(path) if name.split(".")[0] == "vlm"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in found}


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute, else an empty string."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


@cache
def layers(lowest: str) -> list[list[str]]:
    """Layers from the lowest up, as the line of docs/architecture.md that begins with ``lowest``
    states them; members of one layer do not import each other."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"`{lowest}` <"))
    return [re.findall(r"\w+", layer) for layer in line.split("<")]


def layer_of(module: str) -> tuple[int, str]:
    """Height of a module's layer, and the member of it that the module belongs to."""
    parts = module.split(".")
    member = parts[1] if parts[0] == "vlm" else parts[0]
    return _height(layers("errors, log"), member), member


def layer_within(package: str, module: str) -> tuple[int, str]:
    """The same within ``vlm.data`` or ``vlm.nodes``."""
    member = module.split(".")[2]
    return _height(layers(WITHIN[package]), member), member


def _height(among: list[list[str]], member: str) -> int:
    for height, layer in enumerate(among):
        if member in layer:
            return height
    raise AssertionError(f"docs/architecture.md names no layer for {member}")


def test_the_layers_are_those_of_the_documentation() -> None:
    assert layers("errors, log")[-1] == list(SCRIPTS)
    for module in MODULES:
        if module != "vlm":
            layer_of(module)


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_imports_look_down(path: Path) -> None:
    if path == Path("vlm/__init__.py"):
        return
    height, member = layer_of(module_name(path))
    for name in sorted(own_imports(path)):
        below, other = layer_of(name)
        assert below < height or other == member, f"{path} imports {name} from its own layer or up"


@pytest.mark.parametrize("path", [p for p in sources("vlm") if p.parts[1] in WITHIN], ids=str)
def test_imports_look_down_within_a_package(path: Path) -> None:
    if len(path.parts) == 3 and path.name == "__init__.py":
        return
    package = path.parts[1]
    height, member = layer_within(package, module_name(path))
    for name in sorted(own_imports(path)):
        if name.startswith(f"vlm.{package}."):
            below, other = layer_within(package, name)
            assert below < height or other == member, f"{path} imports {name} from its layer or up"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        assert name in graph, f"{trail[-1]} imports {name}, which git does not track"
        if name not in done:
            for below in graph[name]:
                visit(below, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_only_engine_and_ckpt_import_deepspeed(path: Path) -> None:
    uses = any(name.split(".")[0] == "deepspeed" for name in imports(path))
    assert not uses or path.parts[1] in ("engine", "ckpt")


@pytest.mark.parametrize("module", sorted(PURE & set(MODULES)))
def test_planning_is_pure(module: str) -> None:
    allowed = {"numpy", "vlm.errors", *PURE, *(sys.stdlib_module_names - {"os", "io", "socket"})}
    for name in imports(MODULES[module]):
        parents = {name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)}
        assert parents & allowed, f"{module} imports {name}"
    opened = [call.lineno for call in calls(MODULES[module]) if dotted(call.func) == "open"]
    assert not opened


@pytest.mark.parametrize("path", sources("vlm"), ids=str)
def test_the_library_prints_nothing(path: Path) -> None:
    assert not [call.lineno for call in calls(path) if dotted(call.func) == "print"]


@pytest.mark.parametrize("path", sources("vlm"), ids=str)
def test_nothing_happens_at_import(path: Path) -> None:
    for node in parse(path).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert dotted(node.value.func) in AT_IMPORT, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", [p for p in sources("vlm") if p.name == "__init__.py"], ids=str)
def test_packages_are_empty(path: Path) -> None:
    body = parse(path).body
    assert not body or (len(body) == 1 and ast.get_docstring(parse(path)))


@pytest.mark.parametrize("path", sources("vlm", "bench", *SCRIPTS), ids=str)
def test_nothing_is_unpickled(path: Path) -> None:
    picklers = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    assert not {name.split(".")[0] for name in imports(path)} & picklers
    for call in calls(path):
        name = dotted(call.func)
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
        assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
        assert name not in {"eval", "exec", "yaml.load", "yaml.unsafe_load"}, (
            f"{path}:{call.lineno}"
        )


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_no_attribute_is_guessed(path: Path) -> None:
    guesses = [c.lineno for c in calls(path) if dotted(c.func) == "getattr" and len(c.args) == 3]
    assert not guesses, "getattr with a default hides a wrong name"


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        silent = all(isinstance(statement, ast.Pass) for statement in node.body)
        broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        assert not (silent and broad), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", sources("vlm", "tests", "bench", *SCRIPTS), ids=str)
def test_files_are_short(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines; split the file"


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_modules_say_what_they_are_in_ascii(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8").isascii()
    empty = path.name == "__init__.py" and not parse(path).body
    assert empty or ast.get_docstring(parse(path)), f"{path} has no docstring"


@pytest.mark.parametrize("path", sources("vlm", *SCRIPTS), ids=str)
def test_tests_mirror_the_tree(path: Path) -> None:
    if path.name == "__init__.py" or str(path) in UNTESTED:
        return
    folders = path.parts[1:-1] if path.parts[0] == "vlm" else path.parts[:-1]
    mirror = Path("tests", *folders, f"test_{path.name}")
    assert mirror in tracked(), f"{path} has no {mirror}, nor a reason in UNTESTED"


def test_exceptions_to_the_mirror_are_real() -> None:
    for name in UNTESTED:
        path = Path(name)
        assert path in tracked()
        assert Path("tests", *path.parts[1:-1], f"test_{path.name}") not in tracked()


def readme_tree() -> list[list[str]]:
    """Names in the first column of README.md's tree, line by line.

    The tree is the fenced block with a line that starts with ``vlm/``. Names end at two spaces,
    after which a line says what they are; an indented line is below the last one that was not.
    """
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
    tree = next((block for block in blocks if re.search(r"^vlm/", block, re.M)), None)
    if tree is None:
        pytest.skip("README.md has no tree yet")
    lines = []
    folder = ""
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        if line.startswith(" "):
            names = [folder + name for name in names]
        elif names:
            folder = names[-1]
        lines.append(names)
    return lines


def test_the_readme_shows_the_tree_as_it_is() -> None:
    shown = [name for names in readme_tree() for name in names]
    files = {str(path) for path in tracked()}
    folders = {f"{parent}/" for path in tracked() for parent in path.parents[:-1]}
    assert not [name for name in shown if name not in files | folders], "shown but not there"
    top = {f"{p.parts[0]}/" if len(p.parts) > 1 else p.name for p in tracked()}
    hidden = {name for name in top if name.startswith(".")}
    assert not sorted(top - hidden - set(shown)), "there but not shown"
