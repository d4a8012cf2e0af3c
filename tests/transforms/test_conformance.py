"""One table: every public function and module under every transform of JAX.

A row is a step `(state, x, scale, bias) → (state, outputs)`; a column runs it under a transform and
compares with the plain call, or with differences of plain calls where the transform differentiates.
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import sample
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

DEVICES = 4


@dataclasses.dataclass(frozen=True, eq=False)  # a key of caches, by identity
class Row:
    """A step, the state it starts from and the shape of its input, whose channels are at `axis`.

    What a row declares about itself chooses its columns.
    """

    step: Callable[..., tuple[Any, dict[str, Any]]]
    state: Any = ()
    shape: tuple[int, ...] = (8, 3, 4)
    axis: int = -1
    uses_input: bool = True
    uses_train: bool = False
    dtype: Any = np.float32

    def arguments(self, seed=0):
        features = self.shape[self.axis]
        return (
            sample(self.shape, seed, 3.0, 2.0, self.dtype),
            sample(features, seed + 1, 1.0, 0.5, self.dtype),
            sample(features, seed + 2, -0.5, 1.0, self.dtype),
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
            x, state, scale, bias, train=train, virtual_batch_size=len(x) // DEVICES, **fused(x)
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


def conditioned(state, x, scale, bias, train=True, axis_name=None):
    of_samples = scale[None] + jnp.cos(x[:, 0]), bias[None] + jnp.sin(x[:, 1])
    y, state = jaxbn.batch_norm(x, state, *of_samples, train=train, axis_name=axis_name, **fused(x))
    return state, {"y": y}


def of_domains(state, x, scale, bias, train=True, axis_name=None):
    """The samples are of two domains; where an axis is named, each device has its own number."""
    domain = (x[:, 0, 0] > 3).astype(jnp.int32)
    vectors = (jnp.stack([v, jnp.cos(v)]) for v in (scale, bias))
    y, state = jaxbn.batch_norm(
        x, state, *vectors, train=train, axis_name=axis_name, domain=domain, **fused(x)
    )
    return state, {"y": y}


def renormed(state, x, scale, bias, train=True, axis_name=None):
    """Both limits are reached: no gradient flows through the correction, so it must be constant."""
    limits = jaxbn.Renorm(
        r_max=1.2, d_max=lambda count: count.astype("float32") / 10, average_std=True
    )
    y, state = jaxbn.batch_norm(
        x, state, scale, bias, train=train, axis_name=axis_name, renorm=limits, **fused(x)
    )
    return state, {"y": y}


def output_kept(state, x, scale, bias, train=True, axis_name=None):
    options = {"mask": x > 1.5, "activation": "leaky_relu", "keep_output": True}
    y, state = jaxbn.batch_norm(x, state, scale, bias, train=train, axis_name=axis_name, **options)
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
    return Row(step, state, shape, axis, uses_train=True)


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
    state = {name: v for name, v in stats.items() if name in held}
    return Row(step, state, shape, axis, uses_train=True)


def accumulated(create, momentum):
    """A layer that merges two micro-batches into moments, and updates once."""

    def step(state, x, scale, bias, train=True, axis_name=None):
        layer = create(axis_name=axis_name, param_dtype=x.dtype)
        given = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        moments, ys = linen.init_batch_moments(state), []
        for part in (x[:, :1], x[:, 1:]):
            variables = {**given, "batch_moments": moments}
            y, updates = layer.apply(variables, part, False, mutable=["batch_moments"])
            moments, ys = updates["batch_moments"], [*ys, y]
        state = linen.update_batch_stats(state, moments, momentum=momentum)
        return state, {"y": jnp.concatenate(ys, 1)}

    return Row(step, create().init(jax.random.key(0), jnp.zeros((8, 3, 4)), True)["batch_stats"])


def nnx_accumulated(create):
    def step(state, x, scale, bias, train=True, axis_name=None):
        layer = create(axis_name=axis_name, param_dtype=x.dtype, rngs=flax_nnx.Rngs(0))
        for name, value in (state | {"scale": scale, "bias": bias}).items():
            getattr(layer, name).set_value(value)
        nnx.init_batch_moments(layer)
        y = jnp.concatenate([layer(x[:, :1]), layer(x[:, 1:])], 1)
        nnx.update_batch_stats(layer)
        return {name: getattr(layer, name)[...] for name in state}, {"y": y}

    return Row(step, STATS._asdict())


def recalibrated(state, x, scale, bias, train=True, axis_name=None):
    layer = linen.BatchNorm(axis_name=axis_name, param_dtype=x.dtype)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}

    def apply(variables, batch, train, mutable):
        return layer.apply(variables, batch, not train, mutable=mutable)

    batches = [x[:, :1], x[:, 1:]]
    new = linen.recalibrate(apply, variables, batches, sequential=True, prior=0.5)
    return new["batch_stats"], {"y": layer.apply(variables, x, True)}


def equinox_layer():
    """In training, since its modes are known when it is traced."""
    import equinox as eqx

    from jaxbn.equinox import BatchNorm

    def step(state, x, scale, bias, train=True, axis_name=None):
        options = fused(x)
        make = eqx.nn.make_with_state(BatchNorm)
        module, initial = make(4, momentum=0.9, activation=options.pop("activation"))
        module = eqx.tree_at(lambda m: (m.weight, m.bias), module, (scale, bias))
        # Leaves, since `jax.export` does not know the class, and on the mesh, as it demands.
        leaves = [v + jnp.zeros_like(v) for v in state]
        state = jax.tree.unflatten(jax.tree.structure(initial), leaves)
        y, state = module.batched(x, state, axis=-1, axis_name=axis_name, **options)
        return jax.tree.leaves(state), {"y": y}

    vectors = (np.full(4, value, np.float32) for value in (2, 3))  # of no weak type
    return Row(step, [STATS.count, *vectors], IMAGES)


# Rows that are alike have one shape, so that JAX differentiates what they share once.
IMAGES = (8, 2, 2, 4)
STATS = jaxbn.BatchStats(jnp.full(4, 2.0), jnp.full(4, 3.0), jnp.int32(2))
DOMAINS = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), STATS)
FAR = STATS._replace(mean=jnp.zeros(4), var=jnp.full(4, 0.25))
ROWS = {
    "batch_moments": Row(moments),
    "merge_moments": Row(merged),
    "update_batch_stats": Row(updated, STATS),
    "init_batch_stats": Row(initial, STATS, uses_input=False),
    "normalize": Row(normalized),
    "batch_normalize": Row(batch_normalized),
    "batch_normalize, fused": Row(fused_batch_normalized, shape=IMAGES),
    "batch_norm": Row(batch_normed, STATS, IMAGES, uses_train=True),
    "batch_norm, groups": Row(grouped, STATS, uses_train=True),
    "batch_norm, conditional": Row(conditioned, STATS, uses_train=True),
    "batch_norm, domains": Row(of_domains, DOMAINS, uses_train=True),
    "batch_norm, renorm": Row(renormed, FAR, uses_train=True),
    "fold_into_conv": Row(folded),
    "fold_into_dense": Row(folded, shape=(8, 4)),
    "fold_variables": Row(folded_variables),
    "BatchNorm": layer(linen.BatchNorm(momentum=0.9), IMAGES, -1),
    "BatchNorm1d": layer(linen.BatchNorm1d(4), (8, 4, 3), 1),
    "BatchNorm2d": layer(linen.BatchNorm2d(4, axis=-1), IMAGES, -1),
    "BatchNorm3d": layer(linen.BatchNorm3d(3), (8, 3, 2, 2, 2), 1),
    "nnx.BatchNorm": nnx_layer(functools.partial(nnx.BatchNorm, 4, momentum=0.9), IMAGES, -1),
    "nnx.BatchNorm2d": nnx_layer(functools.partial(nnx.BatchNorm2d, 4, axis=-1), IMAGES, -1),
    "linen.update_batch_stats": accumulated(
        functools.partial(linen.BatchNorm1d, 4, axis=-1, activation="silu"), 0.1
    ),
    "nnx.update_batch_stats": nnx_accumulated(functools.partial(nnx.BatchNorm1d, 4, axis=-1)),
    "linen.recalibrate": Row(recalibrated, {"mean": STATS.mean, "var": STATS.var}),
    "batch_norm, keep_output": Row(output_kept, STATS, IMAGES, uses_train=True),
}
if importlib.util.find_spec("equinox"):
    ROWS["equinox.BatchNorm"] = equinox_layer()


def floats(tree):
    return [v for v in jax.tree.leaves(tree) if jnp.issubdtype(v.dtype, jnp.floating)]


def stacked_trees(trees):
    return jax.tree.map(lambda *v: np.stack(v), *trees)


def as_float(tree, dtype):
    return jax.tree.map(
        lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree
    )


@functools.cache
def loss(step):
    """The step with a number in front, in which all that the step puts out has a random weight.

    The new state counts, too, though no gradient flows through it.
    """

    def function(state, *arguments):
        state, outputs = step(state, *arguments)
        dtype = np.promote_types(arguments[0].dtype, jnp.float32)
        total = jnp.zeros((), dtype)
        for i, leaf in enumerate(jax.tree.leaves(outputs)):
            weights = sample(leaf.shape, 30 + i, 0.3, 1.0, leaf.dtype)
            total = total + (jnp.sin(leaf) * weights).sum().astype(dtype)
        for leaf in jax.tree.leaves(state):
            total = total + leaf.sum().astype(dtype)
        return total, (state, outputs)

    return function


def differentiated(function):
    return jax.value_and_grad(function, (1, 2, 3), has_aux=True)


def whole(step):
    """The loss, and once more with its gradients: both ways to compute what a step puts out."""
    function = jax.jit(loss(step))  # traced once
    return lambda *arguments: (function(*arguments), differentiated(function)(*arguments))


@functools.cache
def compiled(row):
    return jax.jit(loss(row.step))


@functools.cache
def compiled_whole(row):
    return jax.jit(whole(row.step))


@functools.cache
def baseline(row):
    """What most columns compare with."""
    return compiled_whole(row)(row.state, *row.arguments())


def plain(row):
    (_, state_and_outputs), _ = baseline(row)
    return state_and_outputs


@functools.cache
def eager(row, train=True):
    return row.step(row.state, *row.arguments(), train=train)


def jit(row):
    assert_close(plain(row), eager(row))


def vmap(row):
    models = []
    for i in range(3):
        state = jax.tree.map(lambda v, i=i: np.asarray(v) + np.asarray(i, v.dtype), row.state)
        models.append((state, *row.arguments(seed=10 * i)))
    stacked = stacked_trees(models)
    together = jax.jit(jax.vmap(whole(row.step)))(*stacked)
    assert_close(together, stacked_trees(compiled_whole(row)(*model) for model in models))


def distributed_outputs(row, sharded, replicated):
    """The tree of specifications: `y` is spread over the devices, all else the same on each."""
    _, outputs = plain(row)
    return replicated, {name: sharded if name == "y" else replicated for name in outputs}


def in_parts(row, run):
    """The step on a batch whose parts are on an axis of their own, joined again."""
    x, scale, bias = row.arguments()
    state, outputs = run(row.state, x.reshape(DEVICES, -1, *x.shape[1:]), scale, bias)
    if "y" in outputs:
        outputs["y"] = np.asarray(outputs["y"]).reshape(x.shape)
    return state, outputs


def vmap_with_axis_name(row):
    step = functools.partial(row.step, axis_name="batch")
    mapped = jax.vmap(
        step, (None, 0, None, None), distributed_outputs(row, 0, None), axis_name="batch"
    )
    assert_close(in_parts(row, jax.jit(mapped)), plain(row))


def pmap(row):
    mapped = jax.pmap(
        functools.partial(row.step, axis_name="batch"),
        axis_name="batch",
        in_axes=(None, 0, None, None),
        out_axes=distributed_outputs(row, 0, None),
        devices=jax.devices()[:DEVICES],
    )
    assert_close(in_parts(row, mapped), plain(row))


def mesh_of(axis_type):
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(axis_type,))


def shard_map(row, check_vma):
    mapped = jax.shard_map(
        functools.partial(row.step, axis_name="batch"),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("batch"), P(), P()),
        out_specs=distributed_outputs(row, P("batch"), P()),
        check_vma=check_vma,
    )
    _, expected = baseline(row)
    actual = jax.jit(differentiated(loss(mapped)))(row.state, *row.arguments())
    assert_close(actual, expected, 1e-4)


def sharded_input(row, axis_type):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x, *vectors = row.arguments()
        x = jax.device_put(x, NamedSharding(mesh, P("batch")))
        actual = compiled_whole(row)(row.state, x, *vectors)
    (_, (_, outputs)), ((_, (_, same)), _) = actual
    for y in (v["y"] for v in (outputs, same) if "y" in v):
        assert {shard.data.size for shard in y.addressable_shards} == {x.size // DEVICES}
    assert_close(actual, baseline(row), 1e-4)


def in_float64(check):
    """Runs a check on a row in float64."""

    @functools.wraps(check)
    def wrapped(row, *options):
        with jax.enable_x64(True):
            check(widened(row), *options)

    return wrapped


@functools.cache
def widened(row):
    return dataclasses.replace(row, state=as_float(row.state, np.float64), dtype=np.float64)


def direction(row, seed=20):
    return tuple(sample(v.shape, seed + i, 0.3, 1.0) for i, v in enumerate(row.arguments()))


@functools.cache
def differences(row, seed=20, arguments=3, step=1e-5):
    """The derivative of the baseline by the first so many arguments, along a direction."""
    steps = [step * v * (i < arguments) for i, v in enumerate(direction(row, seed))]
    ahead, behind = (
        compiled_whole(row)(row.state, *map(operation, row.arguments(), steps))
        for operation in (np.add, np.subtract)
    )
    return jax.tree.map(lambda a, b: np.subtract(a, b) / (2 * step), ahead, behind)


def tangents(row):
    """What `everything` should change by along the direction, from two plain calls.

    No gradient flows through the state: its part is zero, and left out of the loss.
    """
    (value, (state, outputs)), _ = differences(row)
    value = value - sum(leaf.sum() for leaf in jax.tree.leaves(state))
    return value, [np.zeros(v.shape) for v in floats(row.state)], outputs


def inner(first, second):
    return sum((a * b).sum() for a, b in zip(first, second, strict=True))


@in_float64
def grad(row):
    gradients, _ = jax.grad(compiled(row), (1, 2, 3), has_aux=True)(row.state, *row.arguments())
    expected, *_ = tangents(row)
    assert_close(inner(map(np.asarray, gradients), direction(row)), expected, 1e-6)


@in_float64
def value_and_grad(row):
    values, (same, gradients) = baseline(row)
    expected, *_ = tangents(row)
    assert_close(same, values, 1e-9)
    assert_close(inner(map(np.asarray, gradients), direction(row)), expected, 1e-6)


@functools.cache
def everything(row):
    """The loss and all that the step puts out, the new state too, as far as these are real."""

    def function(*arguments):
        value, (state, outputs) = compiled(row)(row.state, *arguments)
        return value, floats(state), outputs

    return function


def values(row):
    (value, (state, outputs)), _ = baseline(row)
    return value, floats(state), outputs


@in_float64
def jvp(row):
    outputs, changes = jax.jvp(everything(row), row.arguments(), direction(row))
    assert_close(outputs, values(row), 1e-12)
    assert_close(changes, tangents(row), 1e-6)


@in_float64
def linearize(row):
    outputs, changes = jax.linearize(everything(row), *row.arguments())
    assert_close(outputs, values(row), 1e-12)
    assert_close(changes(*direction(row)), tangents(row), 1e-6)


@in_float64
def jacobian(row, method):
    jacobians = jax.jit(getattr(jax, method)(everything(row), (0, 1, 2)))(*row.arguments())
    expected = tangents(row)

    def along(parts):
        pairs = zip(parts, direction(row), strict=True)
        return sum(np.tensordot(part, d, d.ndim) for part, d in pairs)

    parts = jax.tree.structure(expected).flatten_up_to(jacobians)
    assert_close(list(map(along, parts)), jax.tree.leaves(expected), 1e-6)


@in_float64
def hessian(row):
    x, *vectors = row.arguments()
    matrix = jax.jit(jax.hessian(lambda x: compiled(row)(row.state, x, *vectors)[0]))(x)
    _, (_, expected) = differences(row, arguments=1)
    assert_close(np.tensordot(matrix, direction(row)[0], x.ndim), expected[0], 1e-5)


@in_float64
def grad_of_grad(row):
    first, other = direction(row), direction(row, 50)

    def along(*arguments):
        gradients, _ = jax.grad(compiled(row), (1, 2, 3), has_aux=True)(row.state, *arguments)
        return inner(gradients, first)

    second = jax.jit(jax.grad(along, (0, 1, 2)))(*row.arguments())
    _, (_, expected) = differences(row, 50)
    assert_close(inner(map(np.asarray, second), other), inner(expected, first), 1e-5)


def scan(row):
    batches = [row.arguments(seed=10 * i) for i in range(3)]
    state, expected = row.state, []
    for arguments in batches:
        ((_, (state, outputs)), _) = compiled_whole(row)(state, *arguments)
        expected.append(outputs)
    run = lambda state, batch: row.step(state, *batch)  # noqa: E731
    assert_close(
        jax.lax.scan(run, row.state, stacked_trees(batches)), (state, stacked_trees(expected))
    )


def while_loop(row):
    arguments = row.arguments()

    def body(carry):
        count, state, total = carry
        state, outputs = row.step(state, *arguments)
        return count + 1, state, jax.tree.map(jnp.add, total, outputs)

    state = row.state
    total = start = jax.tree.map(np.zeros_like, plain(row)[1])
    for _ in range(3):
        ((_, (state, outputs)), _) = compiled_whole(row)(state, *arguments)
        total = jax.tree.map(np.add, total, outputs)
    start = jnp.int32(0), row.state, start
    count, *actual = jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)
    assert count == 3
    assert_close(actual, [state, total])


def traced_train(row):
    def step(train):
        return functools.partial(row.step, train=train)

    arguments = row.state, *row.arguments()
    _, training = baseline(row)
    inference = jax.jit(differentiated(loss(step(False))))(*arguments)
    traced = jax.jit(lambda train, *arguments: whole(step(train))(*arguments))
    for train, expected in ((True, training), (False, inference)):
        assert_close(traced(jnp.array(train), *arguments), (expected[0], expected))
        assert_close(step(jnp.array(train))(*arguments), eager(row, train), 0)
    both = jax.jit(jax.vmap(lambda train: step(train)(*arguments)))(jnp.array([True, False]))
    assert_close(both, stacked_trees(outcome for (_, outcome), _ in (training, inference)))


def remat(row, name):
    policies = jax.checkpoint_policies
    if name == "save_only_these_names":
        policy = policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)
    else:
        policy = getattr(policies, name)
    repeated = differentiated(jax.checkpoint(loss(row.step), policy=policy))
    _, expected = baseline(row)
    assert_close(jax.jit(repeated)(row.state, *row.arguments()), expected)


def export(row):
    arguments = jax.tree.map(jnp.asarray, (row.state, *row.arguments()))
    exported = jax.export.export(compiled(row))(*arguments)
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert_close(restored.call(*arguments), compiled(row)(*arguments), 0)


def eval_shape(row):
    shapes, actual = jax.eval_shape(row.step, row.state, *row.arguments()), eager(row)
    for shape, value in zip(jax.tree.leaves(shapes), jax.tree.leaves(actual), strict=True):
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype)


def donated(row):
    state = jax.tree.map(jnp.copy, row.state)
    actual = jax.jit(row.step, donate_argnums=0)(state, *row.arguments())
    assert_close(actual, plain(row))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def debug_nans(row):
    with jax.debug_nans(True):
        outcome = compiled_whole(row)(row.state, *row.arguments())
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(outcome))


def strict_promotion(row, dtype):
    with jax.numpy_dtype_promotion("strict"):
        x, *vectors = arguments = [v.astype(dtype) for v in row.arguments()]
        _, (state, outputs) = compiled(row)(row.state, *arguments)
    dtypes = [[v.dtype for v in jax.tree.leaves(tree)] for tree in (state, row.state)]
    assert dtypes[0] == dtypes[1]
    assert {v.dtype for v in jax.tree.leaves(outputs.get("moments", ()))} <= {np.dtype("float32")}
    assert outputs.get("y", x).dtype == dtype
    rounded = (v.astype(np.float32) for v in (x, *vectors))
    (_, expected), _ = compiled_whole(row)(row.state, *rounded)
    assert_close(as_float((state, outputs), np.float32), expected, 0.03)


def x64(row):
    with jax.enable_x64(True):
        _, same = compiled(row)(row.state, *row.arguments())
        wide = plain(widened(row))
    assert_close(same, plain(row), 1e-6)
    assert_close(wide, plain(row), 1e-4)
    for tree, dtype in ((same, np.float32), (wide, np.float64)):
        assert {v.dtype for v in jax.tree.leaves(tree)} <= {np.dtype(dtype), np.dtype(np.int32)}


COLUMNS = {
    "jit": jit,
    "vmap over models": vmap,
    "vmap with axis_name": vmap_with_axis_name,
    "pmap": pmap,
    "shard_map": functools.partial(shard_map, check_vma=True),
    "shard_map without check_vma": functools.partial(shard_map, check_vma=False),
    "sharded input": functools.partial(sharded_input, axis_type=AxisType.Auto),
    "sharded input, explicitly": functools.partial(sharded_input, axis_type=AxisType.Explicit),
    "scan": scan,
    "while_loop": while_loop,
    "export": export,
    "eval_shape": eval_shape,
    "strict promotion, bfloat16": functools.partial(strict_promotion, dtype="bfloat16"),
    "strict promotion, float16": functools.partial(strict_promotion, dtype="float16"),
    "x64": x64,
}
OF_DERIVATIVES = {
    "grad": grad,
    "value_and_grad": value_and_grad,
    "jvp": jvp,
    "linearize": linearize,
    "jacfwd": lambda row: jacobian(row, "jacfwd"),
    "jacrev": lambda row: jacobian(row, "jacrev"),
    "hessian": hessian,
    "grad of grad": grad_of_grad,
    "remat, nothing": functools.partial(remat, name="nothing_saveable"),
    "remat, everything": functools.partial(remat, name="everything_saveable"),
    "remat, dots": functools.partial(remat, name="dots_saveable"),
    "remat, names": functools.partial(remat, name="save_only_these_names"),
    "debug_nans": debug_nans,
}
OF_STATE = {"donated statistics": donated}
OF_TRAIN = {"cond with traced train": traced_train}


def columns_of(row):
    """The columns that can fail: of derivatives, state and `train` where the row has these."""
    columns = dict(COLUMNS)
    if row.uses_input:
        columns |= OF_DERIVATIVES
    if jax.tree.leaves(row.state):
        columns |= OF_STATE
    if row.uses_train:
        columns |= OF_TRAIN
    return columns


@pytest.mark.parametrize(
    ("row", "column"), [(name, column) for name, row in ROWS.items() for column in columns_of(row)]
)
def test(row, column):
    columns_of(ROWS[row])[column](ROWS[row])


def differ(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_is_what_it_declares(row):
    (_, others), _ = compiled_whole(row)(row.state, *row.arguments(seed=10))
    assert differ(plain(row), others) == row.uses_input
    assert differ(eager(row), eager(row, False)) == row.uses_train
    if jax.tree.leaves(row.state):
        assert differ(plain(row)[0], row.state)


def test_the_table_has_every_public_name():
    functions = {name for name, value in vars(jaxbn).items() if inspect.isfunction(value)}
    modules = {name for name in dir(linen) if name.startswith("BatchNorm")}
    # The masks are made of names, before anything is traced; a diagnosis reads values.
    untraced = {"_version", "batch_norm_mask", "weight_decay_mask", "report", "explain_gap"}
    assert (functions | modules) - untraced <= set(ROWS)
