"""The benchmark of one layer: every library is called rightly, and the check is strict."""

import collections
import importlib.util
import itertools
import shlex

import jax
import numpy as np
import pytest
from helpers import numpy_reference

from benchmarks import libraries, measuring
from benchmarks.accuracy import referee
from benchmarks.timing import bench_layer, layer_problems, layer_tables, peer_torch

# Of nine, so that every case and every pass has both.
PROBLEMS = [
    layer_problems.Problem(case, passes, 14, 16, 4, *form)
    for (case, passes), form in zip(
        itertools.product(libraries.CASES, layer_problems.PASSES),
        itertools.cycle((("float32", "NHWC"), ("bfloat16", "NCHW"))),
        strict=False,
    )
]
# Two roundings to the dtype of the output; haiku computes in bfloat16 what others do in float32,
# and NNX rounds the vectors to it.
LIMITS = {"float32": 2e-6, "bfloat16": 2.0**-7}
IN_HALF = LIMITS | {"bfloat16": 2.0**-5}


pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.usefixtures("standard_promotion"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("name", libraries.LIBRARIES)
def test_every_library_computes_batch_norm(name, problem):
    package = libraries.LIBRARIES[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    given = layer_problems.arrays(problem, 0)
    function = bench_layer.in_jax(libraries.LIBRARIES[name], problem)
    outputs, _ = function(*bench_layer.jax_inputs(problem, given))
    assert {output.dtype.name for output in outputs} == {problem.dtype}
    limit = (IN_HALF if name in ("haiku", "flax.nnx") else LIMITS)[problem.dtype]
    assert layer_problems.error(problem, outputs, given) < limit


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("name", peer_torch.NAMES[:2])
def test_torch_computes_batch_norm(name, problem):
    pytest.importorskip("torch")
    given = layer_problems.arrays(problem, 0)
    run, inputs = peer_torch.layer(name, problem, [given])
    assert layer_problems.error(problem, run(inputs[0])[0], given) < LIMITS[problem.dtype]


@pytest.mark.parametrize("name", libraries.LIBRARIES)
def test_running_statistics_are_kept_and_have_no_gradient(name):
    package = libraries.LIBRARIES[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    x, scale, bias, _ = numpy_reference.problem((8, 6, 6, 4), -1)
    layer = libraries.LIBRARIES[name].training("BN", -1)
    _, (mean, var) = layer(x, scale, bias)
    # haiku divides by what the weights of the batches so far add up to.
    old = 0.0 if name == "haiku" else 1 - libraries.MOMENTUM
    np.testing.assert_allclose(mean, (1 - old) * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, old + (1 - old) * x.var((0, 1, 2)), rtol=1e-5)
    gradient = jax.grad(lambda x: sum(v.sum() for v in layer(x, scale, bias)[1]))(x)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_the_referee_is_the_one_of_the_tests():
    arguments = numpy_reference.problem((8, 6, 6, 4), -1)
    expected = numpy_reference.train(*arguments, -1)
    for name, actual in referee.training(*arguments)._asdict().items():
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-9, atol=1e-12)


def test_the_referee_has_the_gradient_of_relu_and_residual(x64):
    x, scale, bias, dy = numpy_reference.problem((8, 6, 6, 4), -1, dtype=np.float64)
    residual = numpy_reference.sample(x.shape, 9, 0.2)
    function = libraries.LIBRARIES["jaxbn"].training("BN+add+ReLU", -1)
    y, pullback, _ = jax.vjp(function, x, scale, bias, residual, has_aux=True)
    expected = referee.training(x, scale, bias, dy, residual, relu=True)
    for actual, right in zip((y, *pullback(dy)), (expected.y, *expected[2:]), strict=False):
        np.testing.assert_allclose(actual, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (-1, -1, -1, -1)])
def test_the_check_sees_one_wrong_element(value, place):
    problem = layer_problems.Problem("BN", "forward+backward", 4, 5, 3, "float32", "NHWC")
    given = layer_problems.arrays(problem, 0)
    right = referee.training(*(given[k] for k in ("x", "scale", "bias", "dy")))
    assert layer_problems.error(problem, (right.y, right.dx), given) < 1e-14  # sums in other order
    for wrong in range(2):
        outputs = [right.y.copy(), right.dx.copy()]
        outputs[wrong][place] = value
        assert not layer_problems.error(problem, outputs, given) < 1e-2


def test_the_shapes_are_all_batch_norms_of_resnet50():
    norms = collections.Counter({(112, 64): 1})
    side = 56
    for blocks, channels, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            norms[side, channels] += 1  # the first convolution is in front of the stride
            side //= stride if block == 0 else 1
            norms[side, channels] += 1
            norms[side, 4 * channels] += 1 if block else 2  # with the shortcut's
    assert dict(norms) == layer_problems.RESNET50
    assert norms.total() == 53


@pytest.mark.parametrize(
    ("case", "passes", "transfers", "tensors"),
    [
        ("BN+ReLU", "inference", 2, 1),
        ("BN+ReLU", "forward", 3, 1),
        ("BN+ReLU", "forward+backward", 8, 2),
        ("BN+add+ReLU", "inference", 3, 2),
        ("BN+add+ReLU", "forward", 4, 2),
        ("BN+add+ReLU", "forward+backward", 11, 3),
    ],
)
def test_what_the_two_pass_algorithm_moves(case, passes, transfers, tensors):
    problem = layer_problems.Problem(case, passes, 10, 10, 10, "bfloat16", "NHWC")
    assert problem.transfers == transfers
    assert problem.megabytes == pytest.approx(tensors * 0.02)
    # Together four times the cache; not thousands; never the same twice in turn.
    assert bench_layer.copies_of(problem, 0.04) == int(np.ceil(0.16 / problem.megabytes))
    assert bench_layer.copies_of(problem, 1000) == 64
    assert bench_layer.copies_of(problem, 1e-9) == 2


def test_the_tables_tell_ratios_and_torchs_best():
    times = {
        (7, 512): {"jaxbn": 2.0, "torch": 3.0, "torch channels_last": 8.0},
        (7, 2048): {"jaxbn": 1.0, "torch": 6.0, "torch channels_last": 0.5},
    }
    common = {"case": "BN", "passes": "forward", "batch": 8, "dtype": "float32", "layout": "NHWC"}
    rows = [
        common
        | {"side": side, "channels": channels, "library": name, "ms": ms}
        | {"percent_of_copy_speed": 50.0}
        for (side, channels), named in times.items()
        for name, ms in named.items()
    ]
    assert layer_tables.over_jaxbn(rows) == {
        "jaxbn": "1.00 (1.00 – 1.00)",
        "torch": "3.00 (1.50 – 6.00)",
        "torch channels_last": "1.41 (0.50 – 4.00)",
        "torch's best": "0.87 (0.50 – 1.50)",
    }
    assert list(layer_tables.table(rows).columns[1].cells)[:2] == ["5", "4"]


def test_turns_and_quartiles():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    taken = measuring.take_turns(runs, 8, warm_up=1)
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 1 + 8
    assert {*rounds} == {"ab", "ba"}
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 8, "b": 8}
    assert measuring.quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert measuring.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_program(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.csv"
    arguments = [
        *("--quick", "--batch", "1", "--repetitions", "2", "--dtypes", "float32"),
        *("--libraries", "jaxbn", "flax.linen", "--csv", str(path), "--plot", f"{path}.png"),
    ]
    monkeypatch.setattr("sys.argv", ["bench_layer.py", *arguments, "two words"])
    bench_layer.main(arguments)
    rows, about = measuring.read_csv(path)
    assert about["jax"] == jax.__version__
    assert shlex.split(about["command"])[2:] == [*arguments, "two words"]
    assert len(rows) == 3 * 3 * 2
    assert {row["batch"] for row in rows} == {"1"}  # what is asked for, whatever --quick says
    for row in rows:
        assert float(row["error"]) < LIMITS["float32"]
        assert float(row["lower_ms"]) <= float(row["ms"]) <= float(row["upper_ms"])
    printed = capsys.readouterr().out
    assert printed.count("over jaxbn ") == 3
    assert "geometric mean (smallest – largest)" in printed
    assert (tmp_path / "rows.csv.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--libraries", "flax.linen"], "--libraries must name jaxbn too"),
        (["--libraries", "jaxbn", "caffe"], "invalid choice: 'caffe'"),
        (["--shapes", "7x7"], "invalid choice: '7x7'"),
    ],
)
def test_what_it_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_layer.parsed(arguments)
    assert message in capsys.readouterr().err


def test_the_size_of_the_cache_has_to_be_known(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_layer, "CACHES", tmp_path)
    with pytest.raises(SystemExit):
        bench_layer.parsed([])
    assert "give it as --cache" in capsys.readouterr().err
    for i, size in enumerate(("32K", "2048K")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert bench_layer.parsed([]).cache == pytest.approx(2.097152)
