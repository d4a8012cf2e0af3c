"""Compiles for a TPU v5e where there is none: XLA needs the compiler alone.

pip install libtpu==0.0.48      # beside jax 0.11.2
"""

import importlib.util
import os
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PACKAGE = "libtpu"
# Where there is no TPU to ask, the compiler takes these instead.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def available() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def sharding() -> NamedSharding:
    """A sharding on one TPU v5e: arrays of this sharding make `jax.jit` compile for it."""
    os.environ.update(SETTINGS)
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    devices: Any = np.array(list(topology.devices)[:1])
    return NamedSharding(Mesh(devices, ("device",)), PartitionSpec())
