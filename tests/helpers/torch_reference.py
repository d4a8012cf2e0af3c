"""torch as a second referee: live where it is installed, recorded where it is not.

`python tests/helpers/torch_reference.py` records `torch_reference.npz` anew.
"""

import functools
import importlib.util
import pathlib

import numpy as np
from helpers.numpy_reference import problem, sample

RECORDED = pathlib.Path(__file__).with_suffix(".npz")
INSTALLED = importlib.util.find_spec("torch") is not None

SHAPES = [(5, 3), (3, 2, 4), (3, 3, 2, 3), (2, 2, 3, 2, 3)]
FLAGS = {
    "default": {},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 1": {"momentum": 1.0},
    "momentum 0": {"momentum": 0.0},
    "momentum None": {"momentum": None},
    "eps 0.1": {"eps": 0.1},
    "no bias": {"bias": False},
    "not affine": {"affine": False},
    "not tracked": {"track_running_stats": False},
}
CASES = [(shape, flags) for shape in SHAPES for flags in FLAGS]
STEPS = 3


def steps(shape):
    """The inputs of `STEPS` training steps and one evaluation, with their cotangents."""
    return [(sample(shape, 10 * i), sample(shape, 10 * i + 5, 0.3, 1.0)) for i in range(STEPS + 1)]


def layer(shape, dtype, **flags):
    """A torch layer for inputs of this shape, its parameters away from 0 and 1."""
    import torch

    kind = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(shape)]
    module = getattr(torch.nn, f"BatchNorm{kind}")(shape[1], dtype=dtype, **flags)
    _, scale, bias, _ = problem(shape, 1)
    with torch.no_grad():
        for parameter, value in ((module.weight, scale), (module.bias, bias)):
            if parameter is not None:
                parameter.copy_(torch.tensor(value))
    return module


def backward(module, x, dy):
    """Output and gradients of one call, as NumPy arrays."""
    import torch

    module.zero_grad()
    x = torch.tensor(x, requires_grad=True)
    y = module(x)
    y.backward(torch.tensor(dy))
    gradients = {"dx": x.grad, "dscale": getattr(module.weight, "grad", None)}
    gradients["dbias"] = getattr(module.bias, "grad", None)
    results = {"y": y.detach()} | {k: v for k, v in gradients.items() if v is not None}
    return {name: value.numpy().copy() for name, value in results.items()}


def run_case(shape, flags):
    """Three training steps and one evaluation in float64; name of a quantity -> array."""
    import torch

    module = layer(shape, torch.float64, **FLAGS[flags])
    results = {}
    for i, (x, dy) in enumerate(steps(shape)):
        module.train(i < STEPS)
        results |= {f"{i}/{name}": value for name, value in backward(module, x, dy).items()}
        for name, buffer in module.named_buffers():
            results[f"{i}/{name}"] = buffer.numpy().copy()
    return results


QUESTIONS = {f"{shape} {flags}": (run_case, shape, flags) for shape, flags in CASES}


def live(question):
    """torch's answer, computed now."""
    function, *arguments = QUESTIONS[question]
    return function(*arguments)


@functools.cache
def _record():
    with np.load(RECORDED) as archive:
        return dict(archive)


def recorded(question):
    """torch's answer, as recorded."""
    prefix = question + ": "
    return {k.removeprefix(prefix): v for k, v in _record().items() if k.startswith(prefix)}


def answer(question):
    """torch's answer: live if it can be had, else recorded."""
    return live(question) if INSTALLED else recorded(question)


if __name__ == "__main__":
    answers = {f"{q}: {name}": value for q in QUESTIONS for name, value in live(q).items()}
    np.savez_compressed(RECORDED, **answers)
    print(f"{RECORDED}: {len(answers)} arrays, {RECORDED.stat().st_size} bytes")
