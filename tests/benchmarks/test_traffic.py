"""Memory traffic, read off what is compiled for an H100, which needs its compiler but no GPU."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import jaxbn
from benchmarks.compiled import h100, hlo, network_traffic, step_memory, traffic
from benchmarks.libraries import LIBRARIES
from benchmarks.timing import bench_network
from jaxbn._core.compilers import _pieces

pytestmark = pytest.mark.optimized

# Bytes per element: two passes forward and two backward are 16, 16 and 22 in bfloat16.
LIMITS = {
    ("BN", "bfloat16"): (16.3, 2.01),
    ("BN+ReLU", "bfloat16"): (16.3, 2.01),
    ("BN+add+ReLU", "bfloat16"): (22.3, 4.01),
    ("BN", "float32"): (32.6, 4.01),
    ("BN+ReLU", "float32"): (32.6, 4.01),
    ("BN+add+ReLU", "float32"): (44.6, 8.01),
}

MODULE = """
HloModule example, entry_computation_layout={(bf16[8,4]{1,0}, f32[4]{0})->f32[4]{0}}

%fused (param_0: bf16[8,4], param_1: f32[4]) -> f32[2,4] {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  %slice.1 = bf16[2,4]{1,0} slice(%param_0), slice={[0:2], [0:4]}
  %param_1 = f32[4]{0} parameter(1)
  %convert = f32[2,4]{1,0} convert(%slice.1)
  %broadcast = f32[2,4]{1,0} broadcast(%param_1), dimensions={1}
  ROOT %add = f32[2,4]{1,0} add(%convert, %broadcast)
}

ENTRY %main (x: bf16[8,4], v: f32[4]) -> f32[2,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %v = f32[4]{0} parameter(1)
  %fusion = f32[2,4]{1,0} fusion(%x, %v), kind=kLoop, calls=%fused
  %square = f32[2,4]{1,0} multiply(%fusion, %fusion)
  %both = (f32[2,4]{1,0}, f32[2,4]{1,0}) tuple(%fusion, %square)
  ROOT %sum = f32[2,4]{1,0} all-reduce(%square), replica_groups={}, to_apply=%add
}
"""


def test_the_counter():
    slice_, vector, array = 2 * 4 * 2, 4 * 4, 2 * 4 * 4
    fusion = slice_ + vector + array
    assert hlo.cost(MODULE) == (fusion + 2 * array + 2 * array, 3, 1)
    # What is not only sliced is read whole.
    whole = MODULE.replace("convert(%slice.1)", "convert(%param_0)")
    assert hlo.cost(whole).bytes == hlo.cost(MODULE).bytes - slice_ + 8 * 4 * 2


CONDITIONAL = """
HloModule example

%no (p: f32[8,4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %square = f32[8,4]{1,0} multiply(%p, %p)
  ROOT %sum = f32[4]{0} custom-call(%square)
}

%yes (q: f32[8,4]) -> f32[4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %sum.1 = f32[4]{0} custom-call(%q)
}

ENTRY %main (i: s32[], x: f32[8,4]) -> f32[4] {
  %i = s32[] parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  ROOT %r = f32[4]{0} conditional(%i, %x, %x), branch_computations={%no, %yes}
}
"""


def test_the_counter_takes_one_branch():
    array, vector = 8 * 4 * 4, 4 * 4
    assert hlo.cost(CONDITIONAL) == (array + vector, 1, 0)
    assert hlo.cost(CONDITIONAL, branch=0) == (3 * array + vector, 2, 0)


def test_the_counter_refuses_loops():
    with pytest.raises(ValueError, match="The cost of a loop depends on how often it runs"):
        hlo.cost(MODULE.replace("multiply(", "while("))


@pytest.mark.slow
@pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("layout", traffic.SHAPES)
@pytest.mark.parametrize(("case", "dtype"), LIMITS)
def test_on_an_h100(case, dtype, layout):
    shape, axis = traffic.SHAPES[layout]
    layer = LIBRARIES["jaxbn"].training(case, axis)
    cost = traffic.measure(layer, case, shape, axis, jnp.dtype(dtype), h100.sharding())
    crossing, kept = LIMITS[case, dtype]
    assert cost.forward + cost.backward <= crossing
    assert cost.kept <= kept
    assert cost.collectives == 0


@pytest.mark.slow
@pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_keeping_the_output_costs_no_traffic_on_an_h100(dtype):
    def layer(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, activation="leaky_relu", keep_output=True)

    shape, axis = traffic.SHAPES["NHWC"]
    cost = traffic.measure(layer, "BN", shape, axis, jnp.dtype(dtype), h100.sharding())
    crossing, kept = LIMITS["BN", dtype]
    assert cost.forward + cost.backward <= crossing
    assert cost.kept <= kept


STEP_LIMITS = {"bfloat16": (32.0, 4.35), "float32": (65.5, 9.85)}


def step_cost(library, dtype, **options):
    layers = bench_network.layers_of(library)
    return network_traffic.step_cost(layers, dtype, False, h100.sharding(), 32, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # Flax promotes
@pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin")
@pytest.mark.parametrize("dtype", STEP_LIMITS)
def test_a_training_step_on_an_h100(dtype):
    cost, flax = (step_cost(library, dtype) for library in ("jaxbn", "flax.linen"))
    crossing, temporary = STEP_LIMITS[dtype]
    assert cost["crossing"] <= crossing < flax["crossing"]
    assert cost["temporary"] <= temporary


@pytest.mark.slow
@pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin")
def test_names_save_memory_in_a_training_step_on_an_h100():
    cost = step_cost("jaxbn", "bfloat16")
    named = step_cost("jaxbn", "bfloat16", policy=step_memory.POLICIES["names"])
    assert named["temporary"] <= 0.86 * cost["temporary"]
    assert named["crossing"] <= 1.06 * cost["crossing"]


@pytest.mark.parametrize("layout", traffic.SHAPES)
@pytest.mark.parametrize(("case", "dtype"), LIMITS)
def test_on_the_cpu(case, dtype, layout):
    (_, axis), shape = traffic.SHAPES[layout], (32, 32, 32, 32)
    device = SingleDeviceSharding(jax.devices("cpu")[0])
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes
        cost, flax = (
            traffic.measure(
                LIBRARIES[name].training(case, axis), case, shape, axis, jnp.dtype(dtype), device
            )
            for name in ("jaxbn", "flax.linen")
        )
    assert cost.kept <= LIMITS[case, dtype][1]
    assert cost.forward + cost.backward < flax.forward + flax.backward


@pytest.mark.parametrize(("case", "dtype"), LIMITS)
def test_a_cpu_writes_no_large_temporary(case, dtype):
    """What is computed in front of a sum is not written out, nor a conversion of the input."""
    shape = (32, 32, 32, 32)
    x = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    layer = LIBRARIES["jaxbn"].training(case, -1)

    def step(x, scale, bias, dy, *residual):
        y, pullback, stats = jax.vjp(layer, x, scale, bias, *residual, has_aux=True)
        return y, stats, pullback(dy)

    residual = [x] if "add" in case else []
    memory = jax.jit(step).lower(x, vector, vector, x, *residual).compile().memory_analysis()
    # Two partial sums in float32, each of a quarter of the elements.
    assert math.prod(_pieces(shape, 3)) == 4
    assert memory.temp_size_in_bytes <= 1.01 * 2 * 4 / 4 * 32**4


# Bytes per element, with partial sums of a seventh of the elements. With a loop for each sum, a
# batch norm with ReLU moved 35 and 56 bytes.
CPU_LIMITS = {
    ("BN", "bfloat16"): 25.5,
    ("BN+ReLU", "bfloat16"): 33.5,
    ("BN+add+ReLU", "bfloat16"): 37.5,
    ("BN", "float32"): 38.8,
    ("BN+ReLU", "float32"): 38.8,
    ("BN+add+ReLU", "float32"): 54.8,
}


@pytest.mark.parametrize(("case", "dtype"), CPU_LIMITS)
def test_a_cpu_takes_both_sums_of_a_pass_in_one_loop(case, dtype):
    device = SingleDeviceSharding(jax.devices("cpu")[0])
    layer = LIBRARIES["jaxbn"].training(case, -1)
    cost = traffic.measure(layer, case, (8, 28, 28, 64), -1, jnp.dtype(dtype), device)
    assert cost.forward + cost.backward <= CPU_LIMITS[case, dtype]
