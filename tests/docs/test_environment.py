"""What the documentation shows runs in the environment that it tells the reader to make."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from helpers.reader import PROGRAMS, ROOT, importable

EXAMPLES = [*(ROOT / "examples").rglob("*.py")]
# What they say themselves when it is needed.
MORE = {
    "make_digits.py": {"sklearn"},
    "mobilenet_torch.py": {"torch"},
    "import_torch_model.py": {"safetensors"},
    "onnx_file.py": {"onnx"},
    "third_party.py": {"jax_resnet", "jaxkit"},
}
TRAINER = """
import sys
from helpers import reader
reader.restrict("examples")
from helpers import training
import classify, train_cnn
folder, image = sys.argv[1:]
training.keep(setattr)
classify.MODELS = train_cnn.MODELS
flags = ["--epochs", "2", "--dataset", "digits", "--output", folder]
assert train_cnn.main([*flags, "--resume"]) == 0
assert classify.main([folder, image, "--export", f"{folder}/digits.jaxexport"]) == 0
"""
SNIPPETS = """
import json, pathlib, sys
from helpers import reader
reader.restrict("examples")
for snippet in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    exec(snippet, {})
"""


def modules(source):
    """The top-level modules that a program imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_the_examples_import_what_is_installed():
    known = importable("examples") | {*sys.stdlib_module_names, "jaxbn"}
    for path in EXAMPLES:
        beside = {each.stem for each in path.parent.glob("*.py")}
        foreign = {*modules(path.read_text())} - known - beside - MORE.get(path.name, set())
        assert not foreign, path


def run(program, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_trainer_runs_in_the_environment_of_the_readme(tmp_path):
    run(TRAINER, tmp_path / "run", ROOT / "docs" / "figures" / "modes.png")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        *("checkpoints", "metrics.jsonl", "history.png", "digits.jaxexport")
    }


@pytest.mark.slow
def test_snippets_run_in_the_environment_of_the_readme(tmp_path):
    known = importable("examples") | {*sys.stdlib_module_names, "jaxbn"}
    snippets = [
        snippet
        for page in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
        if page not in PROGRAMS
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    chosen = [snippet for snippet in snippets if {*modules(snippet)} <= known]
    assert len(chosen) > 20
    (tmp_path / "snippets.json").write_text(json.dumps(chosen))
    run(SNIPPETS, tmp_path / "snippets.json")
