"""The layers of ONNX graphs, beside what ONNX itself computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import sample

from jaxbn import linen
from jaxbn.torch import from_state_dict

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
layers = pytest.importorskip("onnx_file").layers
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def drawn(*shape, seed=0):
    return sample(shape, seed, dtype=np.float32)


def model(nodes, tensors):
    """A graph from `x` to the output of the last node."""
    outputs = [helper.make_tensor_value_info(name, 1, None) for name in nodes[-1].output]
    arrays = [numpy_helper.from_array(np.float32(a), name) for name, a in tensors.items()]
    inputs = [helper.make_tensor_value_info("x", 1, None)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def computed(onnx_model, x):
    return ReferenceEvaluator(onnx_model).run(None, {"x": x})


def node(kind, inputs, output="y", name=None, **attributes):
    return helper.make_node(kind, inputs.split(), output.split(), name, **attributes)


W, B = drawn(3, 4), drawn(4, seed=1)
DENSE = {
    "Gemm": ([node("Gemm", "x w.weight b")], W),
    "Gemm, transposed": ([node("Gemm", "x w.weight b", transB=1)], W.T),
    "Gemm with factors": ([node("Gemm", "x w.weight b", alpha=0.5, beta=3.0)], W),
    "Gemm without a bias": ([node("Gemm", "x w.weight")], W),
    "MatMul": ([node("MatMul", "x w.weight")], W),
    "MatMul and Add": ([node("MatMul", "x w.weight", "p"), node("Add", "b p")], W),
    "MatMul with a weight that is transposed before": (
        [
            node("Transpose", "w.weight", "onnx::MatMul_1", perm=[1, 0]),
            node("MatMul", "x onnx::MatMul_1", "p", "/w/MatMul"),
            node("Add", "p b", name="/w/Add"),
        ],
        W.T,
    ),
    "MatMul whose product has several uses": (
        [
            node("MatMul", "x w.weight", "p"),
            node("Add", "p b", "q"),
            node("Sub", "q p", "r"),
            node("Sub", "q r"),
        ],
        W,
    ),
}


WITHOUT_BIAS = ("Gemm without a bias", "MatMul", "MatMul whose product has several uses")


@pytest.mark.parametrize("case", DENSE)
def test_dense_layers(case):
    nodes, weight = DENSE[case]
    onnx_model = model(nodes, {"w.weight": weight, "b": B})
    found, x = layers(onnx_model), drawn(2, 3)
    dense = nn.Dense(4, use_bias=case not in WITHOUT_BIAS)
    variables = dense.init(jax.random.key(0), jnp.asarray(x))
    params, _ = from_state_dict(found.state_dict, "w.", variables=variables)
    y = dense.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(y, computed(onnx_model, x)[0], rtol=1e-5, atol=1e-5)


CONVOLUTIONS = {
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2, "pads": [1, 0, 1, 0]}),
    "strided and dilated": ("Conv", (6, 4, 3, 2), {"strides": [2, 1], "dilations": [1, 2]}),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    kind, shape, attributes = CONVOLUTIONS[case]
    tensors = {"c.weight": drawn(*shape), "bias": drawn(6)}
    onnx_model = model([node(kind, "x c.weight bias", **attributes)], tensors)
    found = layers(onnx_model)
    assert found.attributes == {"c": attributes}
    assert found.transposed == (["c"] if case == "transposed" else [])
    names = {"c": "c"}
    params, _ = from_state_dict(found.state_dict, names=names, transposed=found.transposed)

    strides, pads = attributes.get("strides", 1), attributes.get("pads", [0] * 4)
    options = {"features": 6, "kernel_size": shape[2:], "strides": strides}
    if found.transposed:
        ours = nn.ConvTranspose(padding=[(2 - p, 2 - p) for p in pads[:2]], **options)
    else:
        options |= {"feature_group_count": attributes.get("group", 1)}
        options |= {"kernel_dilation": attributes.get("dilations", 1)}
        ours = nn.Conv(padding=[*zip(pads[:2], pads[2:], strict=True)], **options)
    x = drawn(2, 4, 6, 5)
    y = ours.apply({"params": params["c"]}, jnp.asarray(np.moveaxis(x, 1, -1)))
    expected = np.moveaxis(computed(onnx_model, x)[0], 1, -1)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_trains_on_by_the_convention_of_onnx():
    """`momentum` weighs the old value, and the variance is biased."""
    entries = ("weight", "bias", "running_mean", "running_var")
    values = np.abs(drawn(4, 5)) + 0.5
    tensors = {f"n.{entry}": value for entry, value in zip(entries, values, strict=True)}
    x = drawn(6, 5)
    for training in (0, 1):
        outputs = "y mean var" if training else "y"
        attributes = {"momentum": 0.75, "epsilon": 0.125, "training_mode": training}
        nodes = [node("BatchNormalization", " ".join(["x", *tensors]), outputs, **attributes)]
        onnx_model = model(nodes, tensors)
        found = layers(onnx_model)
        assert found.attributes == {"n": attributes}
        params, stats = from_state_dict(found.state_dict, "n.")
        ours = linen.BatchNorm(not training, momentum=0.75, epsilon=0.125)
        variables = {"params": params, "batch_stats": stats}
        y, updates = ours.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
        expected = computed(onnx_model, x)
        np.testing.assert_allclose(y, expected[0], rtol=1e-5, atol=1e-5)
        for value, name in zip(expected[1:], ("mean", "var"), strict=bool(training)):
            np.testing.assert_allclose(updates["batch_stats"][name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "node_name", "expected"),
    [
        ("layer1.0.conv1.weight", "node_Conv_7", "layer1.0.conv1"),
        ("onnx::Conv_123", "/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        (
            "onnx::Conv_123",
            "/layer1/layer1.0/downsample/downsample.0/Conv",
            "layer1.0.downsample.0",
        ),
        ("onnx::Conv_123", "/layer1/layer1.0/layer1.0.0/Conv", "layer1.0.0"),
        ("model/conv2d/kernel", "model/conv2d/Conv2D", "model/conv2d/Conv2D"),
        ("onnx::Conv_123", "/Conv", "y"),
        ("kernel", None, "y"),
    ],
)
def test_names(weight, node_name, expected):
    onnx_model = model([node("Conv", f"x {weight}", name=node_name)], {weight: drawn(4, 4, 1, 1)})
    assert list(layers(onnx_model).state_dict) == [f"{expected}.weight"]


def test_tensors_and_modules_that_several_nodes_share():
    kernel = numpy_helper.from_array(drawn(4, 4, 1, 1, seed=1))
    nodes = [
        helper.make_node("Constant", [], ["k"], value=kernel),
        node("Identity", "k", "b.weight"),
        node("Conv", "x a.weight", "p", "/a/Conv"),
        node("Conv", "p a.weight", "q", "/a/Conv_1"),
        node("Conv", "q b.weight", "r"),
        node("BatchNormalization", "r ones zeros zeros ones", "s", "/n/BatchNormalization"),
        node("Conv", "s k ones", "y", "/n/BatchNormalization"),
        node("MatMul", "y y", "z"),
        node("MatMul", "z a.weight", "v"),  # of four dimensions
    ]
    tensors = {"a.weight": drawn(4, 4, 1, 1), "ones": np.ones(4), "zeros": np.zeros(4)}
    found = layers(model(nodes, tensors)).state_dict
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = ["a.weight", "b.weight", *(f"n.{entry}" for entry in norm), "y.weight", "y.bias"]
    assert list(found) == expected
    np.testing.assert_array_equal(found["b.weight"], numpy_helper.to_array(kernel))


def test_weights_that_are_computed():
    integers = np.arange(16).reshape(4, 4, 1, 1).astype(np.int8)
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(integers)),
        node("DequantizeLinear", "k half", "w"),
        node("Conv", "x w", name="/c/Conv"),
    ]
    found = layers(model(nodes, {"half": np.array(0.5)})).state_dict
    np.testing.assert_array_equal(found["c.weight"], integers / 2)

    message = r"The weights of the Conv '/c/Conv' must not depend on inputs of the graph; got"
    with pytest.raises(ValueError, match=message):
        layers(model([node("Conv", "x x", name="/c/Conv")], {}))
    with pytest.raises(ValueError, match="transA=1"):
        layers(model([node("Gemm", "x w", transA=1)], {"w": W}))
