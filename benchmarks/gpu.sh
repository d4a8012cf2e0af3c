#!/usr/bin/env bash
# All GPU benchmarks within 8 minutes, on a machine with an NVIDIA GPU, jax, flax and torch:
#
#     benchmarks/gpu.sh [python]
#
# Results are written as they come, so that what takes too long is cut off and the rest stands.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

if ! nvidia-smi >/dev/null 2>&1; then
    echo "gpu.sh: this machine has no NVIDIA GPU that nvidia-smi knows of" >&2
    exit 1
fi
if ! "$python" -c 'import flax, jax, torch; jax.devices("gpu"); assert torch.cuda.is_available()'; then
    echo "gpu.sh: $python needs jax, flax and torch, built for the GPU" >&2
    exit 1
fi

# part SECONDS PROGRAM ARGUMENTS…
status=0
part() {
    local seconds=$1
    shift
    echo "== $*"
    XLA_PYTHON_CLIENT_PREALLOCATE=false timeout "$seconds" "$python" "$@" || {
        echo "gpu.sh: ended with status $?: $*" >&2
        status=1
    }
}

results=benchmarks/results
part 280 benchmarks/bench_gpu.py --batch 256 --csv $results/gpu_layer.csv
part 110 benchmarks/bench_network.py --batch 64 --repetitions 10 --libraries jaxbn flax.linen \
    --csv $results/gpu_network.csv --plot $results/gpu_network.png
part 60 benchmarks/memory.py --csv $results/gpu_memory.csv --plot $results/gpu_memory.png
exit $status
