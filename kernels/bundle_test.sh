#!/usr/bin/env bash
# Runs the tests that need a GPU, all of them, and prints a summary; fails where one does. With --sanitize the kernels' tests
# run under compute-sanitizer's memcheck and racecheck. RADIX_MLP_PYTHON is a Python with transformers (default python3).
set -u
here=$(cd "$(dirname "$0")" && pwd)
export RADIX_MLP_PYTHON=${RADIX_MLP_PYTHON:-python3}
# Where CUDA's libraries may be: a toolkit's, and those of the wheels that torch brings.
wheels=$("$RADIX_MLP_PYTHON" -c 'import nvidia; print(":".join(f"{p}/cu13/lib" for p in nvidia.__path__))' 2>/dev/null)
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:${CUDA_HOME:-/usr/local/cuda}/lib64:$wheels"

summary=()
failed=0
run() { # NAME COMMAND...
    local name=$1
    shift
    if "$@"; then
        summary+=("passed  $name")
    else
        summary+=("FAILED  $name")
        failed=1
    fi
}

# The model's test looks for its script where cargo says the package is.
mkdir -p "$here/package/tests" && cp "$here/tests/make_checkpoints.py" "$here/package/tests"
run "kernels against their oracles" "$here/tests/kernels" --ignored --test-threads 1
run "kernels against each other" "$here/tests/radix_mlp_kernels" --ignored --test-threads 1
run "model against transformers" env CARGO_MANIFEST_DIR="$here/package" "$here/tests/qwen3_transformers" --ignored --test-threads 1 --nocapture
if [ "${1:-}" = --sanitize ]; then
    for tool in memcheck racecheck; do
        run "kernels under $tool" env PROPTEST_CASES=4 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$here/tests/kernels" --ignored --test-threads 1
    done
fi
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
