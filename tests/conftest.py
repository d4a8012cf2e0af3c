"""JAX as the tests use it: several CPU devices, no promotion of dtypes or ranks, fast compilation.

What is compiled is kept in `.jax_cache`, so that equal programs are compiled once for all tests,
workers and runs. XLA also leaves out most of its optimization. Two marks ask for more of it:

- `optimized`: numbers, bytes or times depend on how XLA fuses and vectorizes.
- `trained`: a network is trained, and level 0 computes some of these wrong (NaN losses).
"""

import gc
import os
import pathlib

import jax
import pytest
from jax._src import compiler

CACHE = {
    "jax_compilation_cache_dir": str(pathlib.Path(__file__).parents[1] / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, default in CACHE.items():
    # In the environment too, for the processes that tests start.
    os.environ[name.upper()] = value = os.environ.get(name.upper(), str(default))
    jax.config.update(name, type(default)(value))

# Threads of torch, of several workers, get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects that live long: looking through all of them took a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 10, 10)

TRAINED: dict[str, int | bool] = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    TRAINED["xla_cpu_use_fusion_emitters"] = False  # newer versions have no other emitters
FAST = TRAINED | {"xla_backend_optimization_level": 0}

# JAX has no public setting for the options of all compilations of a process.
compile_options = compiler.get_compile_options
overrides = dict(FAST)


def with_overrides(*arguments, env_options_overrides=None, **options):
    return compile_options(
        *arguments, env_options_overrides=overrides | (env_options_overrides or {}), **options
    )


compiler.get_compile_options = with_overrides


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles as the test asks for, and forgets what was compiled in another way."""
    levels = {"optimized": {}, "trained": TRAINED}
    chosen = next((v for name, v in levels.items() if item.get_closest_marker(name)), FAST)
    if overrides != chosen:
        overrides.clear()
        overrides.update(chosen)
        jax.clear_caches()


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, which users of the examples have."""
    with jax.numpy_dtype_promotion("standard"):
        yield
