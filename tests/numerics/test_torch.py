"""Agreement with `torch.nn.BatchNorm1d`, `2d` and `3d`, over shapes, flags, steps and modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import torch_reference
from helpers.numpy_reference import problem, sample
from helpers.torch_reference import CASES, FLAGS, STEPS

import jaxbn
from jaxbn import linen

NAMES = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}


def moved(x, axis):
    """A channels-first array with its channels at `axis`."""
    return np.moveaxis(x, 1, axis)


@functools.partial(jax.jit, static_argnames="module")
def first_variables(module, x):
    return module.init(jax.random.key(0), x, use_running_average=False)


def build(shape, flags, axis):
    """A layer in float64 with the parameters that torch's has."""
    kind = {2: linen.BatchNorm1d, 3: linen.BatchNorm1d, 4: linen.BatchNorm2d, 5: linen.BatchNorm3d}
    module = kind[len(shape)](shape[1], axis=axis, param_dtype=jnp.float64, **FLAGS[flags])
    variables = first_variables(module, moved(sample(shape, 0), axis))
    _, scale, bias, _ = problem(shape, 1, dtype=np.float32)
    values = {"scale": np.float64(scale), "bias": np.float64(bias)}
    params = {name: values[name] for name in variables.get("params", {})}
    return module, params, variables.get("batch_stats", {})


@functools.partial(jax.jit, static_argnames=("module", "train"))
def backward(module, params, stats, x, dy, train):
    """Output, gradients and new statistics of one call, under torch's names."""

    def call(params, x):
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, not train, mutable=["batch_stats"])

    y, pullback, updates = jax.vjp(call, params, x, has_aux=True)
    dparams, dx = pullback(dy)
    results = {"y": y, "dx": dx} | {f"d{name}": value for name, value in dparams.items()}
    return results, updates.get("batch_stats", {})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "flags", "axis"),
    [
        (shape, flags, axis)
        for i, (shape, flags) in enumerate(CASES)
        for j, axis in enumerate((1, -1))
        if flags == "default" or i % 2 == j
    ],
)
def test_training_steps_then_evaluation(shape, flags, axis):
    expected = torch_reference.recorded(f"{shape} {flags}")
    module, params, stats = build(shape, flags, axis)
    checked = 0
    for i, (x, dy) in enumerate(torch_reference.steps(shape)):
        x, dy = moved(x, axis), moved(dy, axis)
        results, stats = backward(module, params, stats, x, dy, train=i < STEPS)
        results |= {torch_name: stats[name] for torch_name, name in NAMES.items() if stats}
        for name, value in results.items():
            target = expected[f"{i}/{name}"]
            target = moved(target, axis) if name in ("y", "dx") else target
            np.testing.assert_allclose(value, target, rtol=1e-10, atol=1e-10, err_msg=f"{i}/{name}")
            checked += 1
    assert checked == len(expected)


@pytest.mark.skipif(not torch_reference.INSTALLED, reason="torch is not installed")
@pytest.mark.parametrize(("shape", "flags"), CASES)
def test_the_record_is_what_torch_answers(shape, flags):
    question = f"{shape} {flags}"
    live, recorded = torch_reference.live(question), torch_reference.recorded(question)
    assert live.keys() == recorded.keys()
    for name, value in live.items():
        np.testing.assert_allclose(value, recorded[name], 1e-12, 1e-12, err_msg=name)


@pytest.mark.skipif(not torch_reference.INSTALLED, reason="torch is not installed")
def test_corner_cases_are_those_of_torch():
    import torch

    empty = torch.nn.BatchNorm1d(3)
    empty(torch.zeros(0, 3))
    _, stats = jaxbn.batch_norm(jnp.zeros((0, 3)), jaxbn.init_batch_stats(3), train=True)
    for buffer, value in zip(empty.buffers(), stats, strict=True):
        np.testing.assert_array_equal(value, buffer.numpy())

    x = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        torch.nn.BatchNorm1d(3)(torch.tensor(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        jaxbn.batch_norm(x, jaxbn.init_batch_stats(3), train=True)
    assert str(ours.value) == str(theirs.value).replace("torch.Size([1, 3])", "(1, 3)")
