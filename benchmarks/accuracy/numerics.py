"""Rounding errors of batch norm in training, method beside method on the same data, on the CPU.

    python -m benchmarks.accuracy.numerics  # torch, dm-haiku, equinox and keras where installed

Prints four tables in Markdown: the output where means are large; every quantity at one large mean,
with the memory traffic of the compiled modules; the variance in several forms, jaxbn's among them,
with their cost; and the output in bfloat16 and float16. The referee is float64 NumPy on the same,
already rounded input. An error is the largest difference over the largest magnitude.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks import libraries, measuring
from benchmarks.accuracy.referee import Result, error, training
from benchmarks.compiled import h100, hlo, traffic
from benchmarks.timing import peer_torch

SHAPE = (32, 28, 28, 16)
LARGE = (32, 56, 56, 64)
AXES = (0, 1, 2)  # all but the channels
EPSILON = libraries.EPSILON
CONSOLE = Console(width=160, markup=False, highlight=False)


class Method(NamedTuple):
    """`step(x, scale, bias, dy)` and what it is made of in JAX: a layer that gives `(y, var)`."""

    step: Callable[..., Result]
    layer: Callable[..., Any] | None = None
    axis: int = -1  # where the layer wants the channels


def in_jax(layer: Callable[..., Any], axis: int = -1) -> Method:
    """A layer in JAX with its gradients, in one compiled step."""

    def step(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array) -> Result:
        x, dy = (jnp.moveaxis(v, -1, axis) for v in (x, dy))
        y, pullback, var = jax.vjp(layer, x, scale, bias, has_aux=True)
        dx, dscale, dbias = pullback(dy)
        y, dx = (jnp.moveaxis(v, axis, -1) for v in (y, dx))
        return Result(y, var, dx, dscale, dbias)

    return Method(jax.jit(step), layer, axis)


def with_jaxbn() -> Method:
    """This library."""

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, moments = jaxbn.batch_normalize(x, scale, bias, epsilon=EPSILON)
        return y, jax.lax.stop_gradient(moments.var)

    return in_jax(layer)


def with_torch(name: str) -> Method:
    """`torch.nn.functional.batch_norm`, in the memory layout of a name in `peer_torch`."""
    import torch

    def image(array: np.ndarray) -> torch.Tensor:
        return peer_torch.tensor(array, name, -1)

    def channels_last(x: torch.Tensor) -> np.ndarray:
        return x.detach().permute(0, 2, 3, 1).double().numpy()

    def step(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, dy: np.ndarray) -> Result:
        count = x.size // scale.size
        x, scale, bias = (image(v).requires_grad_() for v in (x, scale, bias))
        mean, var = torch.zeros(len(bias)), torch.ones(len(bias))
        y = torch.nn.functional.batch_norm(x, mean, var, scale, bias, True, 1.0, EPSILON)
        y.backward(image(dy))
        biased = var.double().numpy() * (count - 1) / count
        return Result(channels_last(y), biased, channels_last(x.grad), scale.grad, bias.grad)

    return Method(step)


def from_libraries(normalizer: Callable[..., Any], axis: int = -1) -> Method:
    """A layer of `libraries`, whose new variance is, at momentum 1, that of the batch."""
    normalized = functools.partial(normalizer, momentum=1.0)
    layer = libraries.peer("", normalized).training("BN", axis)

    def with_var(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, (_, var) = layer(x, scale, bias)
        return y, var

    return in_jax(with_var, axis)


METHODS = {
    "jaxbn": ("jaxbn", with_jaxbn),
    "torch": ("torch", functools.partial(with_torch, "torch")),
    "torch, NHWC": ("torch", functools.partial(with_torch, "torch channels_last")),
    "Flax": ("flax", lambda: from_libraries(libraries.linen)),
    "Flax, slow": ("flax", lambda: from_libraries(functools.partial(libraries.linen, fast=False))),
    "haiku": ("haiku", lambda: from_libraries(libraries.with_haiku)),
    "equinox": ("equinox", lambda: from_libraries(libraries.with_equinox, axis=1)),
    "keras": ("keras", lambda: from_libraries(libraries.with_keras)),
}
FORMS = {
    "E[x²] − E[x]²": lambda x, shift: jnp.square(x).mean(AXES) - jnp.square(x.mean(AXES)),
    "E[(x − E[x])²]": lambda x, shift: jnp.square(x - x.mean(AXES)).mean(AXES),
    "E[(x − K)²] − E[x − K]²": lambda x, shift: FORMS["E[x²] − E[x]²"](x - shift, None),
    "jaxbn, CPU": lambda x, shift: jaxbn.batch_moments(x).var,
    "jaxbn, GPU and TPU": lambda x, shift: for_accelerators(jaxbn.batch_moments, x).var,
}


def installed() -> dict[str, Method]:
    """The methods whose package is there; a line is printed for each of the others."""
    found = {}
    for name, (package, make) in METHODS.items():
        if importlib.util.find_spec(package) is None:
            CONSOLE.print(f"{name} is left out: the package {package} is not installed.")
        else:
            found[name] = make()
    return found


def sample(mean: float, std: float, shape: Any = SHAPE, seed: int = 0) -> np.ndarray:
    """Normal numbers, computed in float64 and rounded to float32."""
    numbers = np.random.RandomState(seed).standard_normal(shape)
    return (numbers * std + mean).astype(np.float32)


def problem(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """`(x, scale, bias, dy)` with nothing at 0 or 1."""
    scale, bias = sample(1.0, 0.5, x.shape[-1], 1), sample(-0.5, 1.0, x.shape[-1], 2)
    return x, scale, bias, sample(0.3, 1.0, x.shape, 3).astype(x.dtype)


def output_errors(methods: dict[str, Method], data: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """For each input, the error of the output of each method."""
    rows = {}
    for name, x in data.items():
        expected = training(*problem(x)).y
        rows[name] = [error(method.step(*problem(x)).y, expected) for method in methods.values()]
    return rows


def large_means() -> dict[str, np.ndarray]:
    """Inputs whose mean is large beside their standard deviation, after one that is not."""
    pairs = ["0 1", "1e2 1", "1e4 1", "1e4 1e-2", "1e6 1", "1e3 1e-3"]
    return {"mean {}, std {}".format(*p.split()): sample(*map(float, p.split())) for p in pairs}


def every_quantity(methods: dict[str, Method]) -> dict[str, list[Any]]:
    """At mean 1e4: the error of each quantity, and what the compiled modules move."""
    arguments = problem(sample(1e4, 1.0))
    results = [method.step(*arguments) for method in methods.values()]
    rows: dict[str, list[Any]] = {
        name: [error(getattr(result, name), expected) for result in results]
        for name, expected in training(*arguments)._asdict().items()
    }
    label = "bytes per element, forward + backward, CPU module"
    rows[label] = [bytes_per_element(method) for method in methods.values()]
    return rows


def bytes_per_element(method: Method) -> str:
    """Bytes across memory in the forward and the backward module, in the layer's own layout."""
    if method.layer is None:
        return "-"
    axis = method.axis % len(SHAPE)
    shape = tuple(np.insert(SHAPE[:-1], axis, SHAPE[-1]).tolist())
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    # Compiled as one function, no layer hands constants from one pass to the other.
    cost = traffic.measure(jax.jit(method.layer), "BN", shape, axis, jnp.float32, device)
    return f"{cost.forward + cost.backward:.0f}"


def for_accelerators(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function does on platforms other than the CPU, done on the CPU."""

    def choose(*operands: Any, default: Callable[..., Any], **_: Callable[..., Any]) -> Any:
        return default(*operands)

    jax.clear_caches()  # of what was traced for the CPU
    with mock.patch.object(jax.lax, "platform_dependent", choose):
        result = function(*arguments)
    jax.clear_caches()
    return result


def compiled_forms(shape: tuple[int, ...], sharding: Any = None) -> list[Any]:
    """The forms of the variance, compiled once for float32 arrays of a shape."""
    x, shift = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in (shape, shape[-1:])
    )
    return [jax.jit(form).lower(x, shift).compile() for form in FORMS.values()]


def form_costs() -> dict[str, list[Any]]:
    """Bytes that each form reads, and its time on this machine over that of the first."""
    devices = {"CPU": jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])}
    if h100.available():
        devices["H100"] = h100.sharding()
    forms = {device: compiled_forms(LARGE, sharding) for device, sharding in devices.items()}
    size = np.prod(LARGE)
    rows: dict[str, list[Any]] = {
        f"bytes per element, {device}": [f"{hlo.cost(f.as_text()).bytes / size:.2f}" for f in each]
        for device, each in forms.items()
    }
    arguments = jnp.asarray(sample(3.0, 2.0, LARGE)), jnp.ones(LARGE[-1:])
    runs = {
        name: lambda f=form: jax.block_until_ready(f(*arguments))
        for name, form in zip(FORMS, forms["CPU"], strict=True)
    }
    seconds = np.array([taken.min() for taken in measuring.take_turns(runs, 20).values()])
    return rows | {"time on the CPU": [f"{ratio:.2f}" for ratio in seconds / seconds[0]]}


def form_errors() -> dict[str, list[Any]]:
    """For each kind of data, the error of the variance in each form; K is nine tenths of E[x]."""
    functions = compiled_forms(SHAPE)
    rows = {}
    for name, x in kinds_of_data().items():
        exact = x.astype(np.float64)
        shift = (0.9 * exact.mean(AXES)).astype(np.float32)
        rows[name] = [error(function(x, shift), exact.var(AXES)) for function in functions]
    return rows


def kinds_of_data() -> dict[str, np.ndarray]:
    """Data that is hard for one form of the variance or another."""
    constant, outliers, half = (sample(3.0, 1.0) for _ in range(3))
    constant[:, :2] = 7.0
    outliers[:, :2] += 1e4
    half[: len(half) // 2] = 0.0
    spike = np.zeros(SHAPE, np.float32)
    spike[0, 0, 0] = 1e18
    return {
        "N(0, 1)": sample(0.0, 1.0),
        "mean 1e4, std 1": sample(1e4, 1.0),
        "mean 1e6, std 1": sample(1e6, 1.0),
        "first rows constant": constant,
        "first rows outliers of 1e4 std": outliers,
        "first half of the batch zero": half,
        "one spike of 1e18 among zeros": spike,
        "std 1e-14": sample(0.0, 1e-14),
        "std 1e14": sample(0.0, 1e14),
    }


def low_precision() -> dict[str, np.ndarray]:
    """Inputs in bfloat16 and float16, up to nearly the largest that float16 has."""
    inputs = {"mean 3, std 2": sample(3.0, 2.0), "mean 100, std 1": sample(100.0, 1.0)}
    dtypes = {"bfloat16": jnp.bfloat16, "float16": np.float16}
    data = {f"{d}, {k}": x.astype(dtypes[d]) for d in dtypes for k, x in inputs.items()}
    wide = sample(0.0, 1.0)
    return data | {"float16, up to 6e4": (wide / np.abs(wide).max() * 6e4).astype(np.float16)}


def show(title: str, columns: Iterable[str], rows: dict[str, list[Any]]) -> None:
    """Prints a table in Markdown, floats with two digits."""
    table = Table("", *columns, box=box.MARKDOWN)
    for name, cells in rows.items():
        texts = [f"{c:.1e}" if isinstance(c, float) else c for c in cells]
        table.add_row(name, *({"nan": "NaN", "0.0e+00": "0"}.get(text, text) for text in texts))
    CONSOLE.print(title, table, sep="\n")


def main() -> None:
    """Prints the tables."""
    jax.config.update("jax_platforms", "cpu")
    methods = installed()
    show("Large means: error of y", methods, output_errors(methods, large_means()))
    show("Every quantity at mean 1e4, std 1: error", methods, every_quantity(methods))
    show("Forms of the variance: error and cost", FORMS, form_errors() | form_costs())
    some = {name: methods[name] for name in ("jaxbn", "torch", "Flax") if name in methods}
    show("Low precision: error of y", some, output_errors(some, low_precision()))


if __name__ == "__main__":
    main()
