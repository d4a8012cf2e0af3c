"""Models of other packages, which name Flax's batch norm, converted with what the guide says."""

import functools

import jax
import pytest
import third_party

from jaxbn import linen

pytestmark = pytest.mark.trained


@pytest.fixture(autouse=True)
def promotion():
    """JAX's defaults, on which packages rely."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.parametrize("name", third_party.PAIRS)
def test_the_converted_model_trains_as_the_original(name):
    package(name)
    theirs, ours = third_party.PAIRS[name]()
    for actual, expected in zip(ours, theirs, strict=True):
        assert 0 < third_party.difference(actual, expected) < 1e-4


def test_a_converted_resnet_is_one_that_names_ours():
    resnet = functools.partial(
        package("jax_resnet").ResNet18, n_classes=3, hidden_sizes=(8, 8), stage_sizes=(1, 1)
    )
    norm = functools.partial(linen.BatchNorm, momentum=0.9)
    ours, converted = resnet(norm_cls=norm), linen.convert(resnet())
    x = third_party.batches(4, 32, 32, 3)[0][0]
    results = [jax.jit(model.init_with_output)(jax.random.key(0), x) for model in (ours, converted)]
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, results), strict=True))


def test_a_package_with_a_copy_of_flax_s_class(monkeypatch):
    ops = pytest.importorskip("flaxmodels.resnet.ops", reason="flaxmodels is not installed")
    import flaxmodels

    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=3)
    converted = linen.convert(model, classes=[ops.BatchNorm])
    data = third_party.batches(8, 64, 64, 3)[:1]
    variables = jax.jit(model.init)(jax.random.key(1), data[0][0])
    theirs, ours = (third_party.train_linen(v, variables, data) for v in (model, converted))
    monkeypatch.setattr(ops, "BatchNorm", linen.BatchNorm)
    written = third_party.train_linen(model, variables, data)
    for original, actual, expected in zip(theirs, ours, written, strict=True):
        assert third_party.difference(actual, expected) == 0
        # In float32 the gradients of this network, theirs and ours, have two correct digits.
        limit = 0.05 if original is theirs.gradients else 1e-5
        assert 0 < third_party.difference(actual, original) < limit
