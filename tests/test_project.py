"""The project keeps its own rules: import direction, public names, file names, no machine paths."""

import ast
import functools
import graphlib
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"vpt": "vpt", "vpt.branches": "branches", "vpt.evaluation": "evaluation"}
"""Folder of each package; those at the root are linked to from `vpt/`."""

OUTSIDE = ("app", "branches", "evaluation", "recipes", "benchmarks", "tests")
LEVELS = (
    ("vpt.errors",),
    ("vpt.boxes", "vpt.files", "vpt.images", "vpt.media", "vpt.released"),
    ("vpt.protocol",),
    ("vpt.trace",),
    ("vpt.branches",),
    ("vpt.model",),
    ("vpt.depth.maps", "vpt.depth.tokenizer", "vpt.depth.vqvae"),
    ("vpt.inference",),
    ("vpt.view",),
    (
        "vpt.answer",
        "vpt.chat",
        "vpt.detector",
        "vpt.finders",
        "vpt.loading",
        "vpt.runtime",
        "vpt.segmenter",
    ),
    ("vpt.data", "vpt.depth", "vpt.training"),
    ("vpt.evaluation", "vpt.demo", "vpt.serving"),
    ("vpt.policy",),
    ("vpt.cli", "vpt.__main__", "vpt.evaluation.evaluation", "app"),
    ("recipes",),
)
"""Low to high: a module imports those of its own level and of lower ones only."""

DOORS = {"vpt", "vpt.remote", "vpt.embedded.vpt_shim"}
"""Names for others to import, from every level."""


def python_files(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def package_files():
    return [path for folder in PACKAGES.values() for path in python_files(folder)]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("vpt", *parts) if parts[0] in ("branches", "evaluation") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source, module, is_package=False):
    """Modules that a file imports anywhere in it, absolute, relative or by import_module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            named = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if named and called in ("import_module", "__import__"):
                found.add(node.args[0].value)
    return found


def imports_of_file(path):
    source = path.read_text(encoding="utf-8")
    return imports_of(source, module_name(path), path.name == "__init__.py")


def tops(modules):
    return {module.partition(".")[0] for module in modules}


def reached_from(path):
    """Our own modules a file pulls in, directly or not; what only type checkers read included."""
    files = {module_name(p): p for p in package_files()}
    seen, open_ends = set(), [path]
    while open_ends:
        for module in imports_of_file(open_ends.pop()):
            if module in files and module not in seen and files[module].name != "__init__.py":
                seen.add(module)
                open_ends.append(files[module])
    return seen


# --- imports --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("def f():\n    from a import b", {"a", "a.b"}),
        ("from . import x", {"pkg", "pkg.x"}),
        ("from .x import y", {"pkg.x", "pkg.x.y"}),
        ("importlib.import_module('a.b')", {"a.b"}),
    ],
)
def test_every_kind_of_import_is_seen(source, expected):
    assert imports_of(source, "pkg.mod") == expected


@pytest.mark.parametrize("path", python_files("branches"), ids=module_name)
def test_branches_know_nothing_of_the_runtime(path):
    imported = imports_of_file(path)
    assert tops(imported) & set(OUTSIDE) == set()
    ours = {module for module in imported if module.startswith("vpt.")}
    assert all(module.startswith("vpt.branches") for module in ours)


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_what_is_installed_needs_nothing_that_is_not(path):
    assert tops(imports_of_file(path)) & set(OUTSIDE) == set()


@functools.cache
def source_files():
    """Every module that ships, by name."""
    paths = [*package_files(), *python_files("recipes"), ROOT / "app.py"]
    named = {module_name(path): path for path in paths}
    return {name: path for name, path in named.items() if path.name != "__init__.py"}


def own_imports(path):
    return {module for module in imports_of_file(path) if module in source_files()}


def level_of(module):
    """Number of the level, by the longest name in the table that the module's begins with."""
    levels = {name: number for number, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(levels[name] for name in names if name in levels)


@pytest.mark.parametrize("module", sorted(source_files().keys() - DOORS))
def test_imports_go_down_only(module):
    up = {m for m in own_imports(source_files()[module]) - DOORS if level_of(m) > level_of(module)}
    assert not up


def test_no_imports_form_a_circle():
    graph = {module: own_imports(path) - {module} for module, path in source_files().items()}
    graphlib.TopologicalSorter(graph).prepare()  # names the circle, if there is one


def test_the_protocol_needs_the_standard_library_alone():
    ours = {"vpt.errors", "vpt.boxes"}
    for path in python_files("vpt/protocol"):
        imported = imports_of_file(path)
        assert tops(imported) <= {"vpt", *sys.stdlib_module_names}, path
        assert {m for m in own_imports(path) if not m.startswith("vpt.protocol.")} <= ours, path


def test_the_conversation_knows_nothing_of_http_and_gradio():
    conversation = ROOT / "vpt" / "inference" / "conversation.py"
    reached = reached_from(conversation) - {"vpt.media"}  # which alone fetches images
    assert "vpt.protocol.tokens" in reached
    assert not {m for m in reached if m.startswith(("vpt.serving", "vpt.cli", "vpt.training"))}
    web = {"fastapi", "starlette", "uvicorn", "gradio", "httpx", "requests", "aiohttp", "http"}
    files = [conversation, *(p for p in package_files() if module_name(p) in reached)]
    assert not {top for path in files for top in tops(imports_of_file(path))} & web


@pytest.mark.parametrize("path", python_files("branches"), ids=module_name)
def test_no_branch_imports_another(path):
    if path.name == "__init__.py":
        return
    names = {"crop", "dino", "sam", "reencode", "grounding"}
    others = {f"vpt.branches.{name}" for name in names if not path.stem.startswith(name)}
    assert imports_of_file(path) & others == set()


def fresh_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("package", ["vpt", "vpt.branches"])
def test_importing_a_package_is_light(package):
    loaded = fresh_python(f"import sys, {package}; print(*sys.modules)")
    assert package in loaded
    assert tops(loaded) & {"torch", "transformers", "numpy", "PIL", "gradio", "fastapi"} <= (
        {"PIL", "numpy"} if package == "vpt.branches" else set()
    )


# --- public names ---------------------------------------------------------------------------


def names_for_type_checkers(package):
    """Names imported under ``if TYPE_CHECKING``, and those imported or defined outright."""
    lazy, outright = set(), set()
    source = (ROOT / PACKAGES[package] / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            lazy |= {alias.name for item in node.body for alias in item.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpt"):
            outright |= {alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            outright.add(node.name)
    return lazy, outright


@pytest.mark.parametrize("package", ["vpt", "vpt.branches"])
def test_public_names_are_sorted_and_complete(package):
    module = importlib.import_module(package)
    lazy, outright = names_for_type_checkers(package)
    assert module.__all__ == sorted(set(module.__all__))
    assert set(module._HOMES) == lazy
    assert set(module.__all__) == lazy | outright


@pytest.mark.parametrize("package", ["vpt", "vpt.branches"])
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__name__ == name
        assert value.__module__ == module._HOMES.get(name, value.__module__)
        assert value.__doc__


@pytest.mark.parametrize("package", ["vpt", "vpt.branches"])
def test_an_unknown_name_is_an_attribute_error(package):
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_each_file_begins_by_saying_its_idea(path):
    source = path.read_text(encoding="utf-8")
    assert source.startswith('"""')
    first_line = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    assert len(first_line.split()) > 3


def test_no_file_is_named_for_having_no_subject():
    shapeless = {"utils", "util", "common", "helper", "helpers", "misc"}
    folders = ["vpt", *OUTSIDE[1:]]
    names = {path.stem.lower() for folder in folders for path in python_files(folder)}
    assert "tokens" in names
    assert names & shapeless == set()


def test_test_folders_are_no_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_packages_never_print(path):
    if path.name == "cli.py":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def tracked_text_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (data := path.read_bytes())[:8192]:
            yield name, data.decode("utf-8", errors="replace")


MACHINE_PATH = re.compile(r"(?<![\w.)}~*-])/(?:work|root|home|Users)/[\w.]")


@pytest.mark.parametrize("text", ["x = '/ro" + "ot/a'", "see /wo" + "rk/b", "(/ho" + "me/me/c)"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://a.org/home/b", "src/work/b", "~/work/x", "root/"])
def test_other_paths_are_let_pass(text):
    assert not MACHINE_PATH.search(text)


def test_tracked_files_name_no_path_of_one_machine():
    files = dict(tracked_text_files())
    assert "pyproject.toml" in files
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        for name, text in files.items()
        for match in MACHINE_PATH.finditer(text)
    ]
    assert found == []
