"""One table: every public function and module under every transform of JAX.

A row is a step `(state, x, scale, bias) → (state, outputs)`; a column runs it under a transform and
compares with the plain call, or with differences of plain calls where the transform differentiates.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.numpy_reference import sample
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

DEVICES = 4


class Row(NamedTuple):
    """A step, the state it starts from and the shape of its input, whose channels are at `axis`."""

    step: Callable[..., tuple[Any, dict[str, Any]]]
    state: Any = ()
    shape: tuple[int, ...] = (8, 3, 4)
    axis: int = -1

    def arguments(self, dtype=np.float32, seed=0):
        features = self.shape[self.axis]
        return (
            sample(self.shape, seed, 3.0, 2.0, dtype),
            sample(features, seed + 1, 1.0, 0.5, dtype),
            sample(features, seed + 2, -0.5, 1.0, dtype),
        )


def fused(x):
    """A mask, an activation and a residual, made of the input."""
    return {"mask": x > 1.5, "activation": "silu", "residual": jnp.cos(x)}


def moments(state, x, scale, bias, train=True, axis_name=None):
    return state, {"moments": jaxbn.batch_moments(x, axis_name=axis_name, mask=x > 1.5)}


def merged(state, x, scale, bias, train=True, axis_name=None):
    parts = (jaxbn.batch_moments(x[:, i : i + 1], axis_name=axis_name) for i in range(x.shape[1]))
    return state, {"moments": jaxbn.merge_moments(*parts)}


def updated(state, x, scale, bias, train=True, axis_name=None):
    new = jaxbn.batch_moments(x, axis_name=axis_name)
    return jaxbn.update_batch_stats(state, new, momentum=None, skip_nonfinite=True), {}


def initial(state, x, scale, bias, train=True, axis_name=None):
    return jax.tree.map(jnp.add, state, jaxbn.init_batch_stats(x.shape[-1], state.mean.dtype)), {}


def normalized(state, x, scale, bias, train=True, axis_name=None):
    y = jaxbn.normalize(x, bias + 2, jnp.square(scale) + 1, scale, bias, **fused(x))
    return state, {"y": y}


def batch_normalized(state, x, scale, bias, train=True, axis_name=None, **options):
    y, new = jaxbn.batch_normalize(x, scale, bias, axis_name=axis_name, **options)
    return state, {"y": y, "moments": new}


def grouped(state, x, scale, bias, train=True, axis_name=None):
    if axis_name is None:
        y, state = jaxbn.batch_norm(
            x, state, scale, bias, train=train, num_groups=DEVICES, **fused(x)
        )
    else:  # a group is what one device holds
        y, _ = jaxbn.batch_normalize(x, scale, bias, **fused(x))
        merged = jaxbn.batch_moments(x, axis_name=axis_name, mask=fused(x)["mask"])
        state = jaxbn.update_batch_stats(state, merged)
    return state, {"y": y}


def fused_batch_normalized(state, x, *arguments, **options):
    return batch_normalized(state, x, *arguments, **options, **fused(x))


def batch_normed(state, x, scale, bias, train=True, axis_name=None):
    y, state = jaxbn.batch_norm(
        x, state, scale, bias, train=train, axis_name=axis_name, skip_nonfinite=True, **fused(x)
    )
    return state, {"y": y}


def folded(state, x, scale, bias, train=True, axis_name=None):
    """Into a kernel that is the input."""
    fold = jaxbn.fold_into_dense
    if x.ndim > 2:
        fold = functools.partial(jaxbn.fold_into_conv, layout="WIO")
    y, shift = fold(x, bias, bias + 2, jnp.square(scale) + 1, scale, bias)
    return state, {"y": y, "shift": shift}


def folded_variables(state, x, scale, bias, train=True, axis_name=None):
    variables = {
        "params": {"linear": {"kernel": x}, "norm": {"scale": scale, "bias": bias}},
        "batch_stats": {"norm": {"mean": bias + 2, "var": jnp.square(scale) + 1}},
    }
    new = jaxbn.fold_variables(variables, [("linear", "norm")])["params"]["linear"]
    return state, {"y": new["kernel"], "shift": new["bias"]}


def layer(module, shape, axis):
    def step(state, x, scale, bias, train=True, axis_name=None):
        options = fused(x)
        bound = module.clone(
            axis_name=axis_name, activation=options.pop("activation"), param_dtype=x.dtype
        )
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        inference = jnp.logical_not(train) if isinstance(train, jax.Array) else not train
        y, updates = bound.apply(variables, x, inference, mutable=["batch_stats"], **options)
        return updates["batch_stats"], {"y": y}

    state = module.init(jax.random.key(0), jnp.zeros(shape), True)["batch_stats"]
    return Row(step, state, shape, axis)


def nnx_layer(create, shape, axis):
    def step(state, x, scale, bias, train=True, axis_name=None):
        options = fused(x)
        bound = create(
            axis_name=axis_name,
            activation=options.pop("activation"),
            dtype=x.dtype,
            param_dtype=x.dtype,
            rngs=flax_nnx.Rngs(0),
        )
        for name, value in (state | {"scale": scale, "bias": bias}).items():
            getattr(bound, name).set_value(value)
        inference = jnp.logical_not(train) if isinstance(train, jax.Array) else not train
        y = bound(x, inference, **options)
        return {name: getattr(bound, name)[...] for name in state}, {"y": y}

    stats = jaxbn.init_batch_stats(shape[axis])._asdict()
    held = vars(create(rngs=flax_nnx.Rngs(0)))
    return Row(step, {name: v for name, v in stats.items() if name in held}, shape, axis)


STATS = jaxbn.BatchStats(jnp.full(4, 2.0), jnp.full(4, 3.0), jnp.int32(2))
ROWS = {
    "batch_moments": Row(moments),
    "merge_moments": Row(merged),
    "update_batch_stats": Row(updated, STATS),
    "init_batch_stats": Row(initial, STATS),
    "normalize": Row(normalized),
    "batch_normalize": Row(batch_normalized),
    "batch_normalize, fused": Row(fused_batch_normalized),
    "batch_norm": Row(batch_normed, STATS),
    "batch_norm, groups": Row(grouped, STATS),
    "fold_into_conv": Row(folded),
    "fold_into_dense": Row(folded, shape=(8, 4)),
    "fold_variables": Row(folded_variables),
    "BatchNorm": layer(linen.BatchNorm(momentum=0.9), (8, 3, 4), -1),
    "BatchNorm1d": layer(linen.BatchNorm1d(4), (8, 4, 3), 1),
    "BatchNorm2d": layer(linen.BatchNorm2d(3, axis=-1), (8, 2, 2, 3), -1),
    "BatchNorm3d": layer(linen.BatchNorm3d(3), (8, 3, 2, 2, 2), 1),
    "nnx.BatchNorm": nnx_layer(functools.partial(nnx.BatchNorm, 4, momentum=0.9), (8, 3, 4), -1),
    "nnx.BatchNorm2d": nnx_layer(functools.partial(nnx.BatchNorm2d, 3, axis=-1), (8, 2, 2, 3), -1),
}


def as_float(tree, dtype):
    return jax.tree.map(
        lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree
    )


def assert_close(actual, expected, limit=1e-5):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, limit, limit), actual, expected)


def loss(row, with_state=True):
    """A scalar of random weight in all outputs; the state, through which no gradient flows, too."""

    def function(*arguments):
        state, outputs = row.step(row.state, *arguments)
        total = jnp.zeros((), arguments[0].dtype)
        for i, leaf in enumerate(jax.tree.leaves(outputs)):
            total = total + (jnp.sin(leaf) * sample(leaf.shape, 30 + i, 0.3, 1.0, leaf.dtype)).sum()
        if with_state:
            for leaf in jax.tree.leaves(state):
                total = total + leaf.sum().astype(total.dtype)
        return total

    return function


def in_float64(check):
    """Runs a check on float64 arguments, with directions to differentiate along."""

    @functools.wraps(check)
    def wrapped(row, *options):
        with jax.enable_x64(True):
            row = row._replace(state=as_float(row.state, np.float64))
            arguments = row.arguments(np.float64)
            direction = tuple(sample(v.shape, 20 + i, 0.3, 1.0) for i, v in enumerate(arguments))
            check(row, arguments, direction, *options)

    return wrapped


def difference(function, arguments, direction, step=1e-5):
    """The derivative of a tree along a direction, from two plain calls."""
    ahead, behind = (
        function(*(a + sign * step * d for a, d in zip(arguments, direction, strict=True)))
        for sign in (1, -1)
    )
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)


def inner(first, second):
    return sum(jnp.vdot(a, b) for a, b in zip(first, second, strict=True))


def plain(row, *arguments):
    """The step itself; compiled, as in the first column, since tests are slow otherwise."""
    return jax.jit(row.step)(row.state, *arguments)


def jit(row):
    arguments = row.arguments()
    assert_close(jax.jit(row.step)(row.state, *arguments), row.step(row.state, *arguments))


def vmap(row):
    models = [row.arguments(seed=10 * i) for i in range(3)]
    stacked = [np.stack(v) for v in zip(*models, strict=True)]
    together = jax.jit(jax.vmap(functools.partial(row.step, row.state)))(*stacked)
    for i, arguments in enumerate(models):
        one = jax.tree.map(lambda v, i=i: v[i], together)
        assert_close(one, plain(row, *arguments))


def distributed_outputs(row, sharded, replicated):
    """The tree of specifications: `y` is spread over the devices, all else the same on each."""
    _, outputs = jax.eval_shape(row.step, row.state, *row.arguments())
    return replicated, {name: sharded if name == "y" else replicated for name in outputs}


def vmap_with_axis_name(row):
    x, scale, bias = row.arguments()
    parts = x.reshape(DEVICES, -1, *x.shape[1:])
    step = functools.partial(row.step, axis_name="batch")
    mapped = jax.vmap(
        step, (None, 0, None, None), distributed_outputs(row, 0, None), axis_name="batch"
    )
    state, outputs = jax.jit(mapped)(row.state, parts, scale, bias)
    if "y" in outputs:
        outputs["y"] = outputs["y"].reshape(x.shape)
    assert_close((state, outputs), plain(row, x, scale, bias))


def pmap(row):
    x, scale, bias = row.arguments()
    parts = x.reshape(DEVICES, -1, *x.shape[1:])
    mapped = jax.pmap(
        functools.partial(row.step, axis_name="batch"),
        axis_name="batch",
        in_axes=(None, 0, None, None),
        out_axes=distributed_outputs(row, 0, None),
        devices=jax.devices()[:DEVICES],
    )
    state, outputs = mapped(row.state, parts, scale, bias)
    if "y" in outputs:
        outputs["y"] = outputs["y"].reshape(x.shape)
    assert_close((state, outputs), plain(row, x, scale, bias))


def mesh_of(axis_type):
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(axis_type,))


def shard_map(row, check_vma):
    arguments = row.arguments()
    weights = sample(row.shape, 40, 0.3, 1.0, np.float32)
    mapped = jax.shard_map(
        functools.partial(row.step, axis_name="batch"),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("batch"), P(), P()),
        out_specs=distributed_outputs(row, P("batch"), P()),
        check_vma=check_vma,
    )

    def with_gradient(step):
        def total(*arguments):
            state, outputs = step(row.state, *arguments)
            y = outputs.get("y", jnp.zeros(row.shape))
            scalars = jax.tree.map(jnp.sum, outputs.get("moments", ()))
            return (y * weights).sum() + sum(scalars), (state, outputs)

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arguments)

    run = jax.jit(with_gradient, static_argnums=0)
    assert_close(run(mapped), run(row.step), 1e-4)


def sharded_input(row, axis_type):
    arguments = row.arguments()
    run = jax.jit(jax.value_and_grad(loss(row), (0, 1, 2)))
    expected = plain(row, *arguments), run(*arguments)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(arguments[0], NamedSharding(mesh, P("batch")))
        actual = jax.jit(row.step)(row.state, x, *arguments[1:]), run(x, *arguments[1:])
    assert_close(actual, expected, 1e-4)


@in_float64
def grad(row, arguments, direction):
    gradients = jax.grad(jax.jit(loss(row)), (0, 1, 2))(*arguments)
    expected = difference(jax.jit(loss(row, with_state=False)), arguments, direction)
    np.testing.assert_allclose(inner(gradients, direction), expected, 1e-6, 1e-6)


@in_float64
def value_and_grad(row, arguments, direction):
    value, gradients = jax.jit(jax.value_and_grad(loss(row), (0, 1, 2)))(*arguments)
    expected = difference(jax.jit(loss(row, with_state=False)), arguments, direction)
    np.testing.assert_allclose(value, loss(row)(*arguments), 1e-9)
    np.testing.assert_allclose(inner(gradients, direction), expected, 1e-6, 1e-6)


def everything(row):
    """All outputs, and the new state, as far as either is made of real numbers."""

    def function(*arguments):
        state, outputs = row.step(row.state, *arguments)
        return [v for v in jax.tree.leaves(state) if v.dtype == arguments[0].dtype], outputs

    return jax.jit(function)


def tangents_of_everything(row, arguments, direction):
    """Differences of the outputs; zero for the state, through which no gradient flows."""
    state, outputs = difference(everything(row), arguments, direction)
    return jax.tree.map(jnp.zeros_like, state), outputs


@in_float64
def jvp(row, arguments, direction):
    outputs, tangents = jax.jvp(everything(row), arguments, direction)
    assert_close(outputs, everything(row)(*arguments), 1e-12)
    assert_close(tangents, tangents_of_everything(row, arguments, direction), 1e-6)


@in_float64
def linearize(row, arguments, direction):
    outputs, tangent = jax.linearize(everything(row), *arguments)
    assert_close(outputs, everything(row)(*arguments), 1e-12)
    assert_close(tangent(*direction), tangents_of_everything(row, arguments, direction), 1e-6)


@in_float64
def jacobian(row, arguments, direction, method):
    jacobians = jax.jit(getattr(jax, method)(everything(row), (0, 1, 2)))(*arguments)
    expected = tangents_of_everything(row, arguments, direction)

    def along(parts):
        return sum(jnp.tensordot(part, d, d.ndim) for part, d in zip(parts, direction, strict=True))

    parts = jax.tree.structure(expected).flatten_up_to(jacobians)
    assert_close(list(map(along, parts)), jax.tree.leaves(expected), 1e-6)


@in_float64
def hessian(row, arguments, direction):
    x, scale, bias = arguments
    function = loss(row)
    matrix = jax.jit(jax.hessian(lambda x: function(x, scale, bias)))(x)
    product = jnp.tensordot(matrix, direction[0], x.ndim)
    expected = difference(
        jax.jit(lambda x: jax.grad(function)(x, scale, bias)), arguments[:1], direction[:1]
    )
    np.testing.assert_allclose(product, expected, 1e-5, 1e-5)


@in_float64
def grad_of_grad(row, arguments, direction):
    def along(*arguments):
        return inner(jax.grad(loss(row), (0, 1, 2))(*arguments), direction)

    second = jax.jit(jax.grad(along, (0, 1, 2)))(*arguments)
    other = tuple(sample(v.shape, 50 + i, 0.3, 1.0) for i, v in enumerate(arguments))
    expected = difference(jax.jit(along), arguments, other)
    np.testing.assert_allclose(inner(second, other), expected, 1e-5, 1e-5)


def scan(row):
    batches = [row.arguments(seed=10 * i) for i in range(3)]
    state, expected = row.state, []
    for arguments in batches:
        state, outputs = jax.jit(row.step)(state, *arguments)
        expected.append(outputs)
    stacked = [np.stack(v) for v in zip(*batches, strict=True)]
    last, outputs = jax.lax.scan(lambda state, v: row.step(state, *v), row.state, stacked)
    assert_close(last, state)
    for i, one in enumerate(expected):
        assert_close(jax.tree.map(lambda v, i=i: v[i], outputs), one)


def while_loop(row):
    arguments = row.arguments()

    def body(carry):
        count, state, total = carry
        state, outputs = row.step(state, *arguments)
        return count + 1, state, total + sum(map(jnp.sum, jax.tree.leaves(outputs)))

    expected = start = (jnp.int32(0), row.state, jnp.float32(0))
    for _ in range(3):
        expected = jax.jit(body)(expected)
    assert_close(jax.lax.while_loop(lambda carry: carry[0] < 3, body, start), expected)


def traced_train(row):
    run = jax.jit(lambda train: row.step(row.state, *row.arguments(), train=train))
    for train in (True, False):
        assert_close(run(jnp.array(train)), row.step(row.state, *row.arguments(), train=train))


def remat(row, name):
    policies = jax.checkpoint_policies
    if name == "save_only_these_names":
        policy = policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)
    else:
        policy = getattr(policies, name)
    repeated = jax.checkpoint(loss(row), policy=policy)
    actual, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*row.arguments())
        for function in (repeated, loss(row))
    )
    assert_close(actual, expected, 1e-5)


def export(row):
    run, arguments = jax.jit(row.step), (row.state, *row.arguments())
    exported = jax.export.export(run)(*jax.tree.map(jnp.asarray, arguments))
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert_close(restored.call(*arguments), run(*arguments), 0)


def eval_shape(row):
    arguments = row.state, *row.arguments()
    shapes, actual = jax.eval_shape(row.step, *arguments), row.step(*arguments)
    for shape, value in zip(jax.tree.leaves(shapes), jax.tree.leaves(actual), strict=True):
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype)


def donated(row):
    state = jax.tree.map(jnp.copy, row.state)
    actual = jax.jit(row.step, donate_argnums=0)(state, *row.arguments())
    assert_close(actual, plain(row, *row.arguments()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def debug_nans(row):
    with jax.debug_nans(True):
        value, gradients = jax.jit(jax.value_and_grad(loss(row), (0, 1, 2)))(*row.arguments())
        assert all(np.isfinite(v).all() for v in (value, *gradients))


def strict_promotion(row, dtype):
    with jax.numpy_dtype_promotion("strict"):
        arguments = tuple(jnp.asarray(v, dtype) for v in row.arguments())
        state, outputs = plain(row, *arguments)
    dtypes = [[v.dtype for v in jax.tree.leaves(tree)] for tree in (state, row.state)]
    assert dtypes[0] == dtypes[1]
    assert {v.dtype for v in jax.tree.leaves(outputs.get("moments", ()))} <= {np.dtype("float32")}
    assert outputs.get("y", arguments[0]).dtype == dtype
    expected = plain(row, *(v.astype(np.float32) for v in arguments))
    assert_close(as_float((state, outputs), np.float32), expected, 0.03)


def x64(row):
    expected = plain(row, *row.arguments())
    with jax.enable_x64(True):
        same = plain(row, *row.arguments())
        wide_row = row._replace(state=as_float(row.state, np.float64))
        wide = plain(wide_row, *row.arguments(np.float64))
        assert_close(same, expected, 1e-6)
        assert_close(wide, expected, 1e-4)
        for tree, dtype in ((same, np.float32), (wide, np.float64)):
            kinds = {v.dtype for v in jax.tree.leaves(tree)}
            assert kinds <= {np.dtype(dtype), np.dtype(np.int32)}


COLUMNS = {
    "jit": jit,
    "vmap over models": vmap,
    "vmap with axis_name": vmap_with_axis_name,
    "pmap": pmap,
    "shard_map": functools.partial(shard_map, check_vma=True),
    "shard_map without check_vma": functools.partial(shard_map, check_vma=False),
    "sharded input": functools.partial(sharded_input, axis_type=AxisType.Auto),
    "sharded input, explicitly": functools.partial(sharded_input, axis_type=AxisType.Explicit),
    "grad": grad,
    "value_and_grad": value_and_grad,
    "jvp": jvp,
    "linearize": linearize,
    "jacfwd": lambda row: jacobian(row, "jacfwd"),
    "jacrev": lambda row: jacobian(row, "jacrev"),
    "hessian": hessian,
    "grad of grad": grad_of_grad,
    "scan": scan,
    "while_loop": while_loop,
    "cond with traced train": traced_train,
    "remat, nothing": functools.partial(remat, name="nothing_saveable"),
    "remat, everything": functools.partial(remat, name="everything_saveable"),
    "remat, dots": functools.partial(remat, name="dots_saveable"),
    "remat, names": functools.partial(remat, name="save_only_these_names"),
    "export": export,
    "eval_shape": eval_shape,
    "donated statistics": donated,
    "debug_nans": debug_nans,
    "strict promotion, bfloat16": functools.partial(strict_promotion, dtype="bfloat16"),
    "strict promotion, float16": functools.partial(strict_promotion, dtype="float16"),
    "x64": x64,
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test(row, column):
    COLUMNS[column](ROWS[row])


def test_the_table_has_every_public_name():
    functions = {name for name, value in vars(jaxbn).items() if inspect.isfunction(value)}
    modules = {name for name in dir(linen) if name.startswith("BatchNorm")}
    # The mask is made of names, before anything is traced.
    assert (functions | modules) - {"_version", "weight_decay_mask"} <= set(ROWS)
