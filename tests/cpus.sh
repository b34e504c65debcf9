#!/usr/bin/env bash
# Runs the tests of numbers under settings that make this CPU compute as other models do, and with 1, 2 and 3 threads.
#   tests/cpus.sh          the tests of layers, kernels and merges under every setting: make test-cpus
#   tests/cpus.sh short    only the promises of equal bits (the mark same_bits), under the last settings: CI
set -euo pipefail
cd "$(dirname "$0")/.."

# every value of every variable, at least once; a variable that a line leaves out is unset
SETTINGS=(
    "OMP_NUM_THREADS=1"
    "OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2"
    "OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE"
    "OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE"
    "OMP_NUM_THREADS=3 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
)
FILES=(tests/layers tests/kernels tests/adapters tests/checkpoints)
HOW=(-m "not slow and not long" --numprocesses "${WORKERS:-2}" --dist worksteal)
if [ "${1:-}" = short ]; then
    # make test has run them as this CPU computes by itself
    SETTINGS=("${SETTINGS[@]: -2}")
    FILES=(tests/layers/test_linear.py tests/kernels/test_cache.py tests/adapters/test_unmerge.py)
    # one process: these tests take less time than a second one takes to start
    HOW=(-m same_bits)
fi

failed=()
for setting in "${SETTINGS[@]}"; do
    echo "== $setting"
    # inductor would load what it compiled for another setting
    cache=$(mktemp -d)
    # shellcheck disable=SC2086  a setting is several words
    env -u ATEN_CPU_CAPABILITY -u ONEDNN_MAX_CPU_ISA -u MKL_CBWR $setting TORCHINDUCTOR_CACHE_DIR="$cache" \
        "${PYTEST:-.venv/bin/pytest}" -q "${HOW[@]}" "${FILES[@]}" || failed+=("$setting")
    rm -rf "$cache"
done
for setting in "${failed[@]}"; do
    echo "failed under: $setting"
done
[ ${#failed[@]} -eq 0 ]
