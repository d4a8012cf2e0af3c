"""`BatchStats` and `Moments` come back bit for bit from every way to copy, save and send them."""

import copy
import pickle
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers.numpy_reference import sample

import jaxbn


def vector(seed, dtype=np.float32):
    return jnp.asarray(sample(3, seed, 3.0, 1.0, dtype))


STATS = jaxbn.BatchStats(vector(0), vector(1), jnp.int32(7))
VALUES = {
    "stats": STATS,
    "moments": jaxbn.Moments(vector(2), vector(3), jnp.float32(12.0)),
    "masked moments": jaxbn.Moments(vector(2), vector(3), jnp.array([4.0, 0.0, 5.0])),
    "nonfinite": STATS._replace(mean=jnp.array([jnp.nan, jnp.inf, -0.0])),
}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


def assert_same(actual, expected):
    """Types, dtypes and bits."""
    assert type(actual) is type(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_npz(value, path):
    np.savez(path / "value.npz", **value._asdict())
    return type(value)(**np.load(path / "value.npz"))


def saved_safetensors(value, path):
    flax = pytest.importorskip("safetensors.flax", reason="safetensors is not installed")
    flax.save_file(value._asdict(), path / "value.safetensors")
    return type(value)(**flax.load_file(path / "value.safetensors"))


def saved_safetensors_numpy(value, path):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    numpy.save_file({n: np.asarray(v) for n, v in value._asdict().items()}, path / "value")
    return type(value)(**numpy.load_file(path / "value"))


def saved_by_orbax(checkpointer, with_target):
    def saved(value, path):
        with checkpointer() as saver:
            saver.save(path / "tree", {"norm": value})
            if hasattr(saver, "wait_until_finished"):
                saver.wait_until_finished()
            target = {"norm": jax.tree.map(jnp.zeros_like, value)}
            if not with_target:
                return type(value)(**saver.restore(path / "tree")["norm"])
            if checkpointer is ocp.StandardCheckpointer:
                return saver.restore(path / "tree", target)["norm"]
            return saver.restore(path / "tree", item=target)["norm"]

    return saved


def exported(value, path):
    function = jax.export.export(jax.jit(lambda value: jax.tree.map(lambda v: v, value)))(value)
    (path / "function").write_bytes(function.serialize())
    return jax.export.deserialize((path / "function").read_bytes()).call(value)


WAYS = {
    "pickle": lambda value, path: pickle.loads(pickle.dumps(value)),
    "copy": lambda value, path: copy.copy(value),
    "deepcopy": lambda value, path: copy.deepcopy(value),
    "tree": lambda value, path: jax.tree.unflatten(*reversed(jax.tree.flatten(value))),
    "device": lambda value, path: jax.device_put(jax.device_get(value), jax.devices()[1]),
    "jit": lambda value, path: jax.jit(lambda value: value)(value),
    "msgpack": lambda value, path: serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, value), serialization.to_bytes(value)
    ),
    "state dict": lambda value, path: serialization.from_state_dict(
        jax.tree.map(jnp.zeros_like, value), serialization.to_state_dict(value)
    ),
    "msgpack without target": lambda value, path: type(value)(
        **serialization.msgpack_restore(serialization.to_bytes(value))
    ),
    "npz": saved_npz,
    "safetensors": saved_safetensors,
    "safetensors of numpy": saved_safetensors_numpy,
    "orbax": saved_by_orbax(ocp.StandardCheckpointer, True),
    "orbax without target": saved_by_orbax(ocp.StandardCheckpointer, False),
    "orbax PyTree": saved_by_orbax(ocp.PyTreeCheckpointer, True),
    "orbax PyTree without target": saved_by_orbax(ocp.PyTreeCheckpointer, False),
    "export": exported,
}


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")  # of Orbax
@pytest.mark.parametrize("way", WAYS)
@every_value
def test_way(value, way, tmp_path):
    assert_same(WAYS[way](value, tmp_path), value)


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_float64(way, tmp_path):
    value = jaxbn.BatchStats(vector(0, np.float64), vector(1, np.float64), jnp.int32(7))
    assert_same(WAYS[way](value, tmp_path), value)


@every_value
def test_names_on_paths(value):
    paths, _ = jax.tree_util.tree_flatten_with_path({"norm": value})
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        "['norm'].mean",
        "['norm'].var",
        "['norm'].count",
    ]
    named = jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].name, value)
    assert named == type(value)("mean", "var", "count")


def test_an_exported_step_of_training(tmp_path):
    x = jnp.asarray(sample((8, 3), 4, dtype=np.float32))

    def step(x, stats):
        y, moments = jaxbn.batch_normalize(x)
        return y, moments, jaxbn.update_batch_stats(stats, moments)

    data = jax.export.export(jax.jit(step))(x, STATS).serialize()
    actual = jax.export.deserialize(data).call(x, STATS)
    expected = jax.jit(step)(x, STATS)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b) if isinstance(b, tuple) else np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [dict, lambda mapping: mapping])
def test_from_mapping(kind, tmp_path):
    np.savez(tmp_path / "stats.npz", **STATS._asdict())
    with np.load(tmp_path / "stats.npz") as mapping:
        stats = jaxbn.BatchStats.from_mapping(kind(mapping))
    assert_same(stats, STATS)
    assert all(isinstance(v, jax.Array) and not v.weak_type for v in stats)


@pytest.mark.parametrize("count", [7, np.int64(7), np.uint8(7), jnp.int32(7), np.array(7)])
def test_every_kind_of_count_becomes_int32(count):
    stats = jaxbn.BatchStats.from_mapping({**STATS._asdict(), "count": count})
    assert_same(stats, STATS)
    assert not stats.count.weak_type


def test_weak_types_become_strong():
    weak = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0), "count": jnp.asarray(0)}
    assert all(v.weak_type for v in weak.values())
    assert not any(v.weak_type for v in jaxbn.BatchStats.from_mapping(weak))


def test_from_mapping_leaves_arrays_where_they_are():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    mapping = jax.device_put(STATS._asdict(), sharding)
    stats = jaxbn.BatchStats.from_mapping(mapping)
    assert {v.sharding for v in stats} == {sharding}


@pytest.mark.usefixtures("x64")
def test_from_mapping_keeps_float64():
    mapping = {"mean": np.zeros(3), "var": np.ones(3), "count": 0}
    assert_same(jaxbn.BatchStats.from_mapping(mapping), jaxbn.init_batch_stats(3, jnp.float64))


TORCH = {"running_mean": STATS.mean, "running_var": STATS.var, "num_batches_tracked": STATS.count}
FLAX = {"mean": STATS.mean, "var": STATS.var}
MAPPINGS = {
    "torch": (
        TORCH,
        ValueError,
        "BatchStats has the names mean, var, count; missing: mean, var, count; unknown: "
        "running_mean, running_var, num_batches_tracked. For torch's names use "
        "`jaxbn.torch.from_state_dict`.",
    ),
    "torch, of a model": (
        {f"bn1.{name}": value for name, value in TORCH.items()},
        ValueError,
        "For torch's names use `jaxbn.torch.from_state_dict`.",
    ),
    "flax": (
        FLAX,
        ValueError,
        "missing: count; unknown: none. Where none was kept, as by Flax, add count=0.",
    ),
    "one name too many": (
        {**STATS._asdict(), "scale": STATS.mean},
        ValueError,
        "missing: none; unknown: scale.",
    ),
    "no scalar count": (
        {**FLAX, "count": jnp.zeros(3, int)},
        ValueError,
        "`mean` and `var` must be vectors of the same channels, and `count` a scalar; got the "
        "shapes (3,), (3,) and (3,).",
    ),
    "other channels": ({**FLAX, "var": jnp.ones(4), "count": 0}, ValueError, "(3,), (4,) and ()."),
    "no vectors": (
        {"mean": jnp.ones((1, 3)), "var": jnp.ones((1, 3)), "count": 0},
        ValueError,
        "(1, 3), (1, 3) and ().",
    ),
    "float count": (
        {**FLAX, "count": 7.0},
        TypeError,
        "`stats.count` must be an integer array, the number of batches; got float32.",
    ),
    "half precision": (
        {"mean": jnp.ones(3, jnp.bfloat16), "var": jnp.ones(3, jnp.bfloat16), "count": 0},
        TypeError,
        "Running statistics must be float32 or float64; got stats.mean of dtype bfloat16",
    ),
    "float64": (
        {"mean": STATS.mean, "var": np.ones(3), "count": 0},
        TypeError,
        "`var` is float64, which would be rounded to float32. Enable 64-bit types with "
        'jax.config.update("jax_enable_x64", True), or convert it with .astype(jnp.float32).',
    ),
    "no array": ({**FLAX, "mean": "zeros", "count": 0}, TypeError, "`mean` must be an array;"),
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_message_of_from_mapping(case):
    mapping, error, message = MAPPINGS[case]
    with pytest.raises(error, match=re.escape(message)):
        jaxbn.BatchStats.from_mapping(mapping)


def restore_msgpack(old, path):
    serialization.from_bytes(STATS, serialization.msgpack_serialize(old))


def restore_orbax(old, path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path / "tree", old)
        saver.wait_until_finished()
        saver.restore(path / "tree", STATS)


@pytest.mark.parametrize("old", [TORCH, FLAX], ids=["torch", "flax"])
@pytest.mark.parametrize("restore", [restore_msgpack, restore_orbax])
def test_flax_and_orbax_name_what_differs(restore, old, tmp_path):
    with pytest.raises(ValueError, match="do not match") as raised:
        restore(old, tmp_path)
    assert all(name in str(raised.value) for name in {*old, "count"} - {"mean", "var"})
