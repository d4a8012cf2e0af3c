"""What a release promises to compute: results on inputs that never change.

    python tests/golden/make_golden.py          # prints which results differ, and by how much
    python tests/golden/make_golden.py --renew  # replaces golden.npz

Renew the file only for a change of the numbers that is meant, and name the change in CHANGELOG.md:
users compare training runs. A last bit that differs with another JAX or processor is no reason.
Make the file with the oldest JAX that is supported, which stays the same for long.

Most cases train on three batches. Their results are the outputs, the gradients of `Σ dy·y`, the
running statistics after the last batch, and its output in inference mode.
"""

import argparse
import functools
import math
import os
import pathlib
import platform
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx

import jaxbn
from jaxbn import linen, nnx

FILE = pathlib.Path(__file__).with_name("golden.npz")
BATCHES = 3
KEPT = 60  # so many values of a result, or up to twice as many, evenly spaced
# How far results may be off with another JAX or processor, in `ulps`, by the bytes of a value. Half
# precision is rounded once. Of the others, 2.25 were seen with another JAX, 8 with the instructions
# of another processor, and 12 without XLA's optimization.
LIMITS = {2: 1, 4: 16, 8: 16}
DENSE, IMAGES, CHANNELS_FIRST, LARGE = (12, 5), (4, 3, 3, 5), (4, 5, 3, 3), (8, 64, 32, 4)


def numbers(seed, shape):
    """Random numbers in [0, 1), with 24 bits; NumPy promises the stream of PCG64 to stay."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return (raw >> np.uint64(40)).reshape(shape) / 2**24


def trained(
    shape, dtype="float32", step=jaxbn.batch_norm, mean=3, given=(), per_sample=False, **options
):
    """Results of a step; `given` names what it takes beside `x`."""
    batches, channels = (BATCHES, *shape), shape[options.get("axis", -1)]
    floats = {"x": 4 * numbers(1, batches) + mean - 2, "residual": 2 * numbers(2, batches) - 1}
    floats = {k: jnp.asarray(v, dtype) for k, v in floats.items() if k in ("x", *given)}
    others = {
        "mask": jnp.asarray(numbers(3, (*batches[:-1], 1)) < 0.7),
        "domain": jnp.asarray(numbers(4, batches[:2]) < 0.5, jnp.int32),
    }
    others = {k: v for k, v in others.items() if k in given}
    dy = jnp.asarray(numbers(5, batches) - 0.25, dtype)
    wide = "float64" if dtype == "float64" else "float32"
    affine = (shape[0], channels) if per_sample else (channels,)
    scale, bias = (jnp.asarray(numbers(i, affine) - 0.5 * (i - 6), wide) for i in (6, 7))
    stats = jaxbn.init_batch_stats(channels, wide, num_domains=2 if "domain" in given else None)
    run = functools.partial(step, **options)

    def compute(stats, scale, bias, floats, others, dy):
        def all_batches(scale, bias, floats):
            def one(stats, batch):
                y, stats = run(stats=stats, scale=scale, bias=bias, train=True, **batch)
                return stats, y

            return jax.lax.scan(one, stats, floats | others)[::-1]

        y, pullback, after = jax.vjp(all_batches, scale, bias, floats, has_aux=True)
        dscale, dbias, gradients = pullback(dy)
        last = jax.tree.map(lambda v: v[-1], floats | others)
        inferred, _ = run(stats=after, scale=scale, bias=bias, train=False, **last)
        gradients = {f"d{name}": v for name, v in gradients.items()}
        results = {"y": y, "inferred": inferred, "dscale": dscale, "dbias": dbias}
        return results | gradients | after._asdict()

    if "axis_name" in options:
        mapped = (None, None, None, 1, 1, 1)
        compute = jax.vmap(compute, mapped, axis_name=options["axis_name"])
    return jax.jit(compute)(stats, scale, bias, floats, others, dy)


def of_linen(layer):
    """A step of a Linen layer. One with Flax's constructor leaves the count as it is."""

    def step(x, stats, scale, bias, train):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats._asdict()}
        y, updates = layer.apply(variables, x, not train, mutable=["batch_stats"])
        return y, jaxbn.BatchStats(**updates["batch_stats"])

    return step


def of_nnx(make, **fields):
    """A step of an NNX layer. One with Flax's constructor has no count."""

    def step(x, stats, scale, bias, train):
        layer = make(x.shape[-1], rngs=flax_nnx.Rngs(0), **fields)
        layer.scale[...], layer.bias[...] = scale, bias
        kept = [name for name in stats._fields if hasattr(layer, name)]
        for name in kept:
            getattr(layer, name)[...] = getattr(stats, name)
        y = layer(x, not train)
        return y, stats._replace(**{name: getattr(layer, name)[...] for name in kept})

    return step


def second_order():
    """The gradient of the squared norm of a gradient."""
    x, dy = (jnp.asarray(4 * numbers(i, DENSE) + 1, "float64") for i in (1, 5))

    def loss(x):
        return (dy * jnp.square(jaxbn.batch_normalize(x)[0])).sum()

    return {"dx": jax.jit(jax.grad(lambda x: jnp.square(jax.grad(loss)(x)).sum()))(x)}


@jax.jit
def moments():
    """Moments of parts, merged, and the cumulative average of their statistics."""
    x = jnp.asarray(4 * numbers(1, DENSE) + 1, "float32")
    parts = [jaxbn.batch_moments(part) for part in (x[:2], x[2:7], x[7:])]
    stats = jaxbn.init_batch_stats(DENSE[-1])
    for part in parts:
        stats = jaxbn.update_batch_stats(stats, part, momentum=None)
    merged = jaxbn.merge_moments(*parts)._asdict()
    return merged | {f"running_{name}": v for name, v in stats._asdict().items()}


@jax.jit
def folded():
    """Kernels and biases of linear layers in front of a batch norm."""
    kernel = jnp.asarray(numbers(1, (3, 3, 4, 5)) - 0.5, "float32")
    bias, mean, var, scale, shift = jnp.asarray(numbers(2, (5, 5)) + 0.5, "float32")
    vectors = bias, mean, var, scale, shift
    conv = jaxbn.fold_into_conv(kernel, *vectors)
    dense = jaxbn.fold_into_dense(kernel[0, 0], *vectors)
    names = ("conv_kernel", "conv_bias", "dense_kernel", "dense_bias")
    return dict(zip(names, (*conv, *dense), strict=True))


# What `trained` takes.
TRAINED = {
    "float16": {"shape": DENSE, "dtype": "float16"},
    "bfloat16": {"shape": DENSE, "dtype": "bfloat16"},
    "float32": {"shape": DENSE},
    "float64": {"shape": DENSE, "dtype": "float64"},
    "channels first": {"shape": CHANNELS_FIRST, "axis": 1},
    "cumulative, biased": {"shape": DENSE, "momentum": None, "unbiased": False},
    "large": {"shape": LARGE},
    "large, large mean": {"shape": LARGE, "mean": 1e4},
    "large, bfloat16": {"shape": LARGE, "dtype": "bfloat16", "activation": "relu"},
    "mask": {"shape": IMAGES, "given": ("mask",)},
    "ReLU, residual, bfloat16": {
        **{"shape": IMAGES, "dtype": "bfloat16"},
        **{"activation": "relu", "given": ("residual",)},
    },
    "SiLU": {"shape": IMAGES, "activation": "silu"},
    "GELU, float64": {"shape": IMAGES, "dtype": "float64", "activation": "gelu"},
    "output kept": {"shape": IMAGES, "activation": "leaky_relu", "keep_output": True},
    "ghost batches": {"shape": DENSE, "virtual_batch_size": 4},
    "renormalization": {"shape": DENSE, "renorm": jaxbn.Renorm(r_max=1.5, d_max=0.5)},
    "domains": {"shape": DENSE, "given": ("domain",)},
    "conditional": {"shape": IMAGES, "per_sample": True},
    "devices": {"shape": (2, *DENSE), "axis_name": "devices", "given": ("mask",)},
    "linen.BatchNorm": {"shape": DENSE, "step": of_linen(linen.BatchNorm())},
    "linen.BatchNorm2d": {"shape": IMAGES, "step": of_linen(linen.BatchNorm2d(5, axis=-1))},
    "nnx.BatchNorm": {"shape": DENSE, "step": of_nnx(nnx.BatchNorm)},
    "nnx.BatchNorm2d": {"shape": IMAGES, "step": of_nnx(nnx.BatchNorm2d, axis=-1)},
}
OTHERS = {"second order, float64": second_order, "moments": moments, "folding": folded}
NAMES = (*TRAINED, *OTHERS)


def results(name):
    """The results of a case, thinned out."""
    with jax.enable_x64("float64" in name):
        found = trained(**TRAINED[name]) if name in TRAINED else OTHERS[name]()
    return {key: np.ravel(v)[:: max(1, v.size // KEPT)] for key, v in found.items()}


def environment():
    """What last bits depend on: the version of JAX, and the processor."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model", "flags", "Features"))})
    checksum = zlib.crc32("\n".join(kind).encode())
    return f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores, {checksum:08x}"


def ulps(found, golden):
    """The largest difference, in units of the last place of the largest value."""
    if not jnp.issubdtype(found.dtype, jnp.floating):
        return 0.0 if np.array_equal(found, golden) else math.inf
    largest = np.abs(golden).max()
    unit = float(jnp.finfo(found.dtype).eps) * 2.0 ** np.floor(np.log2(largest or 1))
    return float(np.abs(found.astype(np.float64) - golden).max() / unit)


def read():
    """The environment in which the file was made, and its results by case."""
    with np.load(FILE) as file:
        found = {key: file[key] for key in file.files}
    recorded = str(found.pop("environment"))
    golden = {}
    for key, values in found.items():
        name, _, result = key.rpartition("/")
        golden.setdefault(name, {})[result] = values
    return recorded, golden


def differences(name, golden):
    """`ulps` of each result of a case, and the limit of its dtype."""
    found = results(name)
    assert found.keys() == golden.keys(), (name, *found.keys() ^ golden.keys())
    return {k: (ulps(v, golden[k]), LIMITS[v.dtype.itemsize]) for k, v in found.items()}


def renew():
    """Writes the results of this JAX on this processor."""
    golden = {f"{name}/{key}": v for name in NAMES for key, v in results(name).items()}
    wide = {key: v.astype(np.float64) for key, v in golden.items()}
    np.savez_compressed(FILE, environment=environment(), **wide)
    print(f"{FILE}: {len(wide)} results, {FILE.stat().st_size} bytes, {environment()}")


def compare():
    """Prints the results that differ, and returns whether any does."""
    recorded, golden = read()
    print(f"made by {recorded}; this is {environment()}")
    found = {name: differences(name, golden[name]) for name in NAMES}
    different = [
        (name, key, *pair) for name in NAMES for key, pair in found[name].items() if pair[0]
    ]
    for name, key, distance, limit in different:
        print(f"{name}/{key}: {distance:.2f} ulps of the largest value; the limit is {limit}")
    print(f"{len(different)} of {sum(map(len, found.values()))} results differ")
    return bool(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compares results with those of the release.")
    parser.add_argument("--renew", action="store_true", help="replace golden.npz")
    sys.exit(renew() if parser.parse_args().renew else compare())
