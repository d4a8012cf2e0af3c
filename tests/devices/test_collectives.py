"""What devices tell each other, read off compiled modules: for CPUs, and for H100s without one."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import collectives, h100, hlo
from benchmarks.compiled.collectives import BATCH, CHANNELS, SHAPE, flax, measure, mesh_of, ours
from jaxbn._core import moments

pytestmark = pytest.mark.optimized

ROOT = pathlib.Path(__file__).parents[2]

H100 = pytest.param(
    "h100",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin"),
    ],
)
PLACES = ["cpu", H100]


def devices_of(place, count=8):
    return h100.devices(count) if place == "h100" else jax.devices("cpu")[:count]


def whole(devices):
    return (SHAPE[0] * devices, *SHAPE[1:])


@functools.cache
def measured(way, make, place):
    return collectives.ways(devices_of(place))[way](make)


def opcodes(step):
    return tuple([collective.opcode for collective in half] for half in step)


MODULE = """
HloModule example

ENTRY %main (x: f32[3,4]) -> f32[8,3,4] {
  %x = f32[3,4]{1,0} parameter(0)
  %start = (f32[3,4]{1,0}, f32[8,3,4]{2,1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[8,3,4]{2,1,0} all-gather-done(%start)
  %sum = f32[3,4]{1,0} all-reduce-start(%x), to_apply=%add
  %summed = f32[3,4]{1,0} all-reduce-done(%sum)
  ROOT %both = (f32[3,4]{1,0}, f32[3,4]{1,0}) all-reduce(%x, %summed), to_apply=%add
}
"""


def test_the_counter():
    array = 3 * 4 * 4
    assert hlo.collectives(MODULE) == [
        ("all-gather", array, 8 * array),
        ("all-reduce", array, array),
        ("all-reduce", 2 * array, 2 * array),
    ]


ONE_EACH_WAY = (["all-gather"], ["all-reduce"])
EXPECTED = {
    "shard_map": ONE_EACH_WAY,
    "shard_map without check_vma": ONE_EACH_WAY,
    "jit, explicit mesh": ONE_EACH_WAY,
    "jit, channels over devices": ([], []),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", EXPECTED)
def test_one_collective_each_way(way, place):
    assert opcodes(measured(way, ours, place)) == EXPECTED[way]


@pytest.mark.parametrize("place", PLACES)
def test_an_automatic_mesh_sums_once_more_for_the_shift(place):
    step, peer = (measured("jit, automatic mesh", make, place) for make in (ours, flax))
    # On the CPU the shift is corrected, which is another sum.
    assert opcodes(step) == (["all-reduce"] * (3 if place == "cpu" else 2), ["all-reduce"])
    if place == "h100":
        assert step.sent == peer.sent


@pytest.mark.parametrize("place", PLACES)
def test_many_devices_get_no_more_than_a_few(place, monkeypatch):
    many = 32 if place == "h100" else 8
    monkeypatch.setattr(moments, "GATHERED", many // 2)
    jax.clear_caches()  # of what was traced for a few
    mesh = mesh_of(devices_of(place, many))
    step = measure(ours("devices"), mesh, BATCH, whole(many), check_vma=True)
    jax.clear_caches()
    assert opcodes(step) == (["all-reduce"] * 2, ["all-reduce"])
    assert step.received == 24 * SHAPE[-1]


@pytest.mark.parametrize("place", PLACES)
def test_a_mask_costs_no_collective_more(place):
    def masked(x, scale, bias):
        return ours("devices", mask=x > 0)(x, scale, bias)

    mesh = mesh_of(devices_of(place))
    step = measure(masked, mesh, BATCH, whole(8), check_vma=True)
    assert opcodes(step) == ONE_EACH_WAY
    assert step.sent == (4 + 2) * 4 * SHAPE[-1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_two_axes_are_gathered_at_once(check_vma, place):
    mesh = Mesh(
        np.array(devices_of(place)).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2
    )
    step = measure(ours(("a", "b")), mesh, P(("a", "b")), whole(8), check_vma)
    assert opcodes(step) == ONE_EACH_WAY


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(8 * 4096, 64), (8 * 512, 2, 2, 64), (64, 16, 16, 64)])
def test_the_shift_moves_no_part_of_a_batch(shape, place):
    step = measure(ours(), mesh_of(devices_of(place)), BATCH, shape)
    assert set(opcodes(step)[0] + opcodes(step)[1]) == {"all-reduce"}
    assert all(collective.sent <= 2 * 4 * shape[-1] for half in step for collective in half)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", [8, 16])
def test_groups_that_devices_hold_need_no_collective(groups, axis_type, place):
    mesh = mesh_of(devices_of(place), axis_type)

    def collectives_of(outputs):
        def step(x, dy):
            scale, bias = jnp.ones(SHAPE[-1]), jnp.zeros(SHAPE[-1])
            y, pullback, stats = jax.vjp(
                lambda x, scale, bias: ours(virtual_batch_size=whole(8)[0] // groups)(
                    x, scale, bias
                ),
                x,
                scale,
                bias,
                has_aux=True,
            )
            dx, dscale, dbias = pullback(dy)
            return {"images": (y, dx), "stats": stats, "vectors": (dscale, dbias)}[outputs]

        x = jax.ShapeDtypeStruct(
            whole(8), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, BATCH)
        )
        with jax.set_mesh(mesh):
            text = jax.jit(step).lower(x, x).compile().as_text()
        return [collective.opcode for collective in hlo.collectives(text)]

    assert collectives_of("images") == []
    assert collectives_of("stats") == ["all-reduce"] * 2
    assert collectives_of("vectors") == ["all-reduce"]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_channels_on_devices_of_their_own_need_no_collective(axis_type):
    mesh = mesh_of(devices_of("cpu"), axis_type)
    assert opcodes(measure(ours(), mesh, CHANNELS, whole(1))) == ([], [])


def rows(text):
    return {" ".join(line.split()) for line in text.splitlines() if line.startswith("| ")}


DOCUMENTED = rows((ROOT / "docs" / "distributed.md").read_text())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", [*EXPECTED, "jit, automatic mesh"])
def test_the_documented_figures_of_eight_devices(way, place):
    for make, library in ((ours, "jaxbn"), (flax, "Flax")):
        step = measured(way, make, place)
        cells = f"{way}, {library}", *step.describe(), step.sent, step.received
        assert f"| {' | '.join(map(str, cells))} |" in DOCUMENTED


@pytest.mark.slow
def test_the_documented_figures():
    """The tables of the benchmark on 1 to 256 devices, row by row."""
    command = [sys.executable, "-m", "benchmarks.compiled.collectives"]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    output = process.stdout
    printed = rows(output)
    assert len(printed) >= 2 + 2 * 5 + len(collectives.COUNTS)
    assert printed <= DOCUMENTED
