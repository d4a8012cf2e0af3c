"""The benchmarks on small sizes: what they time is right, and what is deterministic holds."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import libraries, measuring, networks
from benchmarks.compiled import memory, step_memory
from benchmarks.timing import bench_gpu, bench_network, layer_problems, small_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.usefixtures("standard_promotion"),
]


def test_the_network_benchmark(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    bench_network.main(
        [
            *("--quick", "--networks", "resnet20"),
            *("--libraries", "jaxbn", "flax.linen", "--csv", str(path), "--plot", f"{path}.png"),
        ]
    )
    rows, _ = measuring.read_csv(path)
    losses = {row["library"]: float(row["first_loss"]) for row in rows}
    megabytes = {row["library"]: float(row["megabytes"]) for row in rows}
    assert losses["jaxbn"] == pytest.approx(losses["flax.linen"], rel=1e-3)
    assert losses["jaxbn"] != pytest.approx(losses["none"], rel=1e-3)
    assert megabytes["jaxbn"] < megabytes["flax.linen"]


def test_blocks_under_scan_are_the_blocks():
    params = jax.vmap(lambda key: networks.bottleneck_params(key, 16))(
        jax.random.split(jax.random.key(0), 3)
    )
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 16))
    layers = bench_network.layers_of("jaxbn")
    plain, scanned = (networks.blocks(params, x, layers, scan)[0] for scan in (False, True))
    np.testing.assert_allclose(plain, scanned, atol=1e-5)


@pytest.mark.parametrize("case", libraries.CASES)
@pytest.mark.parametrize("dtype", memory.DTYPES)
def test_no_peer_keeps_less(case, dtype):
    size = np.dtype(np.float32).itemsize if dtype == "float32" else 2
    kept, rest = memory.kept_in_jax(libraries.LIBRARIES["jaxbn"], case, dtype)
    assert kept == size * (1 + ("add" in case))  # the input, and there the output
    assert rest == 0
    for library in libraries.installed().values():
        assert kept <= memory.kept_in_jax(library, case, dtype)[0]


def test_no_torch_keeps_less():
    pytest.importorskip("torch")
    for case in libraries.CASES:
        ours, _ = memory.kept_in_jax(libraries.LIBRARIES["jaxbn"], case, "float32")
        assert ours <= memory.kept_in_torch(case, "float32")[0]


def test_what_is_named_is_kept_once_a_layer():
    ours = libraries.LIBRARIES["jaxbn"]
    # The input of the network, and the input of each of its three batch norms.
    assert memory.kept_in_blocks(ours, "float32", policy=True) == pytest.approx(4 * (1 + 3) / 3)
    assert memory.kept_in_blocks(ours, "float32", policy=False) == pytest.approx(
        4 * (1 + 3 + 2) / 3
    )


def test_a_deep_network_is_no_larger_a_program_than_with_flax():
    values = {(row["what"], row["library"]): row["median"] for row in small_layers.sizes()}
    for what, library in values:
        if library.startswith("jaxbn."):
            peer = library.replace("jaxbn", "flax")
            assert values[what, library] <= values[what, peer], what


def test_small_layers_are_timed(tmp_path):
    path = tmp_path / "rows.csv"
    small_layers.main(
        ["--repetitions", "2", "--compilations", "1", "--depth", "2", "--csv", str(path)]
    )
    rows, _ = measuring.read_csv(path)
    assert {row["library"] for row in rows} == set(small_layers.models(1))
    assert all(float(row["median"]) > 0 for row in rows)


def test_the_gpu_benchmark_runs_without_one(tmp_path):
    path = tmp_path / "rows.csv"
    bench_gpu.main(["--device", "cpu", "--quick", "--dtypes", "float32", "--csv", str(path)])
    rows, _ = measuring.read_csv(path)
    assert {row["library"] for row in rows} == {"jaxbn", "flax.linen"}
    assert {row["passes"] for row in rows} == set(layer_problems.PASSES)
    assert all(float(row["error"]) < 2e-6 for row in rows)
    assert all(float(row["lower_ms"]) > 0 for row in rows)


def test_steps_under_checkpoints_are_compiled(tmp_path, capsys, monkeypatch):
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    monkeypatch.setattr(step_memory.traffic, "compilers", lambda: {"CPU": cpu})
    path = tmp_path / "rows.csv"
    step_memory.main(["--stages", "7×7×2048", "--batch", "1", "--csv", str(path)])
    assert "CPU, bfloat16, batch 1" in capsys.readouterr().out
    rows = [line for line in path.read_text().splitlines() if line.startswith("7×7×2048")]
    assert len(rows) == 2 * 2 * len(step_memory.POLICIES)
