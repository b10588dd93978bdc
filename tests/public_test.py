"""What every public name promises, and what the package keeps out."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import typing

import pytest

import metajax

_ROOT = pathlib.Path(metajax.__file__).parent
_PACKAGES = ["metajax", *(f"metajax.{module.name}" for module in pkgutil.iter_modules([str(_ROOT)]))]


def _is_plain(thing):
    """Modules, numbers, tuples of them, and names of types, which have no docstring of their own."""
    return inspect.ismodule(thing) or type(thing) in (int, tuple) or typing.get_origin(thing) is not None


_PUBLIC = [
    (package, name)
    for package in _PACKAGES
    for name in importlib.import_module(package).__all__
    if not _is_plain(getattr(importlib.import_module(package), name))
]


def _unannotated(function):
    signature = inspect.signature(function)
    names = [
        name for name, parameter in signature.parameters.items()
        if parameter.annotation is inspect.Parameter.empty and name not in ("self", "cls")
    ]  # fmt: skip
    silent = signature.return_annotation is inspect.Signature.empty and function.__name__ != "__init__"
    return names + ["return"] * silent


def test_what_is_public_is_listed_once_in_order_and_there():
    for package in _PACKAGES:
        module = importlib.import_module(package)
        assert list(module.__all__) == sorted(set(module.__all__), key=lambda name: (not name.isupper(), name)), package
        assert module.__doc__, package
        assert all(hasattr(module, name) for name in module.__all__), package
    assert set(metajax.core.__all__) - set(metajax.__all__) == {
        "Dtype", "Features", "accuracy", "cross_entropy", "merge", "outer_objective", "span_cross_entropy", "split",
        "squared_error",
    }  # fmt: skip


@pytest.mark.parametrize(("package", "name"), _PUBLIC)
def test_a_public_name_is_documented_with_an_example_and_annotated(package, name):
    thing = getattr(importlib.import_module(package), name)
    assert thing.__doc__, f"{package}.{name} has no docstring"
    if inspect.isfunction(thing):
        assert not _unannotated(thing)
    elif inspect.isclass(thing):
        own = {key: value for key, value in vars(thing).items() if inspect.isfunction(value)}
        for key, method in own.items():
            generated = method.__module__ != thing.__module__ or "<string>" in method.__code__.co_filename
            if not generated and (not key.startswith("_") or key == "__init__"):
                assert not _unannotated(method), f"{package}.{name}.{key}"
                assert key == "__init__" or inspect.getdoc(method), f"{package}.{name}.{key} has no docstring"
    if not getattr(thing, "_is_protocol", False):
        assert ">>> " in thing.__doc__, f"{package}.{name} has no example"


def test_import_brings_neither_tensorflow_nor_torch_nor_pyplot():
    code = "import metajax, sys; print([name for name in ('tensorflow', 'torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_is_quick():
    """Under 2 s on an idle machine; processor time and a wide margin, since this one may be busy."""
    code = "import time, metajax; print(time.process_time())"
    times = []
    while not times or (times[-1] >= 4 and len(times) < 3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert times[-1] < 4, times


def test_the_package_works_without_tensorflow():
    code = """
import sys
sys.modules["tensorflow"] = None
import metajax
source, spec = metajax.data.sinusoids(), metajax.data.EpisodeSpec(1, 5, 5)
assert metajax.data.episode(source, spec, seed=0, index=0).query.inputs.shape == (5, 1)
try:
    metajax.data.episodes(source, spec, batch=1, seed=0)
except ImportError as error:
    assert "tensorflow" in str(error)
else:
    raise SystemExit("an ImportError was due")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_code_of_the_readme_runs_as_it_stands():
    text = (_ROOT.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    for long, short in (("steps=200", "steps=2"), ("spec))", "spec, episodes=4))")):  # its length is no claim
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md", "exec"), {})


_SOURCES = sorted(_ROOT.rglob("*.py"))


def test_no_file_is_long_and_none_reaches_into_jax():
    for path in _SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 500, path
        assert max(map(len, text.splitlines()), default=0) <= 120, path
        assert "jax._src" not in text, path
        if path.parent.name != "run":  # the launchers
            assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
            assert "absl" not in text, path


_FLOORS = [
    "core", "tasks", "inner hypergrad parallel models adapters", "data", "replay learners pretrained", "training",
    "evaluation online", "adaptation run",
]  # fmt: skip
_FLOOR = {name: place for place, names in enumerate(_FLOORS) for name in names.split()}


def _crossings(path):
    """The packages of metajax that a file imports, and the private modules of others among them."""
    own = path.relative_to(_ROOT).parts[0] if path.parent != _ROOT else ""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "metajax":
            for alias in node.names:
                parts = [*node.module.split("."), alias.name][1:]
                if parts[0] in _FLOOR and parts[0] != own:
                    yield own, parts


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_no_import_runs_upward_or_into_a_private_module(path):
    if path.parent == _ROOT:
        return
    for own, (package, *rest) in _crossings(path):
        assert _FLOOR[package] <= _FLOOR[own], f"{own} imports {package}"
        private = [part for part in rest if part.startswith("_")]
        assert package == "core" or not private, f"{own} imports {package}.{'.'.join(rest)}"


def test_few_names_are_compared():
    """What a section is, its factory's signature says; a comparison of names is a case by hand."""
    found = []
    for path in _SOURCES:
        if path.relative_to(_ROOT).parts[0] in ("run", "training", "adaptation"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.name}: {line.strip()}" for line in text.splitlines() if re.search(_COMPARED, line)]
    assert len(found) <= 3, found


_COMPARED = r"""(\.name|\["name"\]|_name\(\w+\)) (==|!=|in) |is learners\.|is models\."""


def _imported(text):
    """The modules that a program imports, and what it takes from them, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _reaches(text, package):
    return any(name == package or name.startswith(f"{package}.") for name in _imported(text))


@pytest.mark.parametrize(
    "text",
    [
        "from metajax import core, hypergrad", "from metajax import hypergrad as other", "import metajax.hypergrad",
        "from metajax.hypergrad import mixed_mode", "from metajax.hypergrad._mixed import mixed_loop",
        "def late():\n    from metajax import (\n        core,\n        hypergrad,\n    )",
    ],
)  # fmt: skip
def test_an_import_is_found_however_it_is_written(text):
    assert _reaches(text, "metajax.hypergrad")
    assert not _reaches(text, "metajax.hyper")


def test_learners_and_estimators_never_name_each_other():
    for one, other in (("learners", "hypergrad"), ("hypergrad", "learners")):
        for path in (_ROOT / one).glob("*.py"):
            assert not _reaches(path.read_text(encoding="utf-8"), f"metajax.{other}"), path


def test_the_core_imports_nothing_above_it_and_task_types_the_core_alone():
    above = {path.name for path in _ROOT.iterdir() if path.is_dir()} - {"core", "__pycache__"}
    for package, allowed in (("core", set()), ("tasks", {"tasks"})):
        for path in (_ROOT / package).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not [name for name in above - allowed if _reaches(text, f"metajax.{name}")], path
