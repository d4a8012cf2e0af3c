"""Compiles for an H100 where there is none: XLA needs the compiler and a description, not a GPU.

pip install jax==0.11.2 jax-cuda13-plugin==0.11.2      # Python 3.12; about 400 MB
"""

import importlib.util
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Figures of the H100 SXM5 80 GB: NVIDIA H100 Tensor Core GPU Architecture (2022) and, for compute
# capability 9.0, the CUDA C++ Programming Guide's table of technical specifications.
DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
dnn_version_info { major: 9 minor: 12 }
"""


PACKAGE = "jax-cuda13-plugin"


def available() -> bool:
    """Whether the compiler for NVIDIA GPUs is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def devices(count: int) -> list[Any]:
    """Some H100s in one machine, to compile for."""
    jax.devices("cpu")
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=DESCRIPTION, topology=f"1x1x{count}"
    )
    return list(topology.devices)


def sharding() -> NamedSharding:
    """A sharding on one H100: arrays of this sharding make `jax.jit` compile for it."""
    return NamedSharding(Mesh(np.array(devices(1)), ("device",)), PartitionSpec())
