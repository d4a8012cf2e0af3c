#!/usr/bin/env bash
# All GPU benchmarks within 8 minutes, on a machine with an NVIDIA GPU, jax, flax, torch and jaxbn:
#
#     benchmarks/gpu.sh [python]
#
# Tables go to results/gpu.md, rows to results/gpu_*.csv as they come, so that what takes too long is
# cut off and the rest stands.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=benchmarks/results

if ! nvidia-smi >/dev/null 2>&1; then
    echo "gpu.sh: this machine has no NVIDIA GPU that nvidia-smi knows of" >&2
    exit 1
fi
if ! "$python" -c 'import flax, jax, jaxbn, torch; jax.devices("gpu"); assert torch.cuda.is_available()'; then
    echo "gpu.sh: $python needs jax, flax and torch, built for the GPU, and jaxbn (pip install -e .)" >&2
    exit 1
fi

# part SECONDS PROGRAM ARGUMENTS…
part() {
    local seconds=$1
    shift
    printf '\n`%s`\n\n' "python $*"
    XLA_PYTHON_CLIENT_PREALLOCATE=false timeout "$seconds" "$python" "$@" || {
        echo "gpu.sh: ended with status $?: $*" >&2
        return 1
    }
}

all_parts() {
    local status=0
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv
    part 250 -m benchmarks.timing.bench_gpu --csv $results/gpu_layer.csv || status=1
    part 80 -m benchmarks.timing.bench_gpu --libraries jaxbn torch.compile --dtypes bfloat16 \
        --passes forward+backward --csv $results/gpu_compile.csv || status=1
    part 110 -m benchmarks.timing.bench_network --batch 64 --repetitions 10 --libraries jaxbn flax.linen \
        --networks resnet20 56×56×256 14×14×1024 --dtypes bfloat16 float32 \
        --csv $results/gpu_network.csv --plot $results/gpu_network.png || status=1
    part 40 -m benchmarks.compiled.memory --csv $results/gpu_memory.csv --plot $results/gpu_memory.png || status=1
    return $status
}

mkdir -p $results
all_parts | tee $results/gpu.md
exit "${PIPESTATUS[0]}"
