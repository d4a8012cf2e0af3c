"""MobileNetV2 folded beside unfolded, as the benchmark times them: the same, with less to run."""

import jax
import mobilenet
import numpy as np
import pytest

import jaxbn
from benchmarks.timing import folding

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def test_a_folded_network_gives_the_same_with_fewer_kernels():
    x = 1 + 2 * jax.random.normal(jax.random.key(2), (1, 32, 32, 3))
    network = mobilenet.MobileNetV2()
    variables = folding.variables_of(network, x)
    less = jaxbn.fold_variables(variables, mobilenet.conv_norm_pairs())
    assert len(jax.tree.leaves(variables)) == 52 + 5 * 52  # a kernel for each norm's five
    assert len(jax.tree.leaves(less)) == 2 * 52

    unfolded = folding.compiled(network, variables, x)
    folded = folding.compiled(mobilenet.MobileNetV2(folded=True), less, x)
    expected = np.asarray(unfolded.run())
    assert np.abs(folded.run() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert folded.fusions < unfolded.fusions
    assert folded.megabytes < unfolded.megabytes
