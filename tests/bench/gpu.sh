#!/usr/bin/env bash
# Everything that waits for a GPU, in one command and under nine minutes:
#   bash tests/bench/gpu.sh            # one GPU; results in tests/bench/results/
#   bash tests/bench/gpu.sh --dry      # the same on a CPU with tiny models, results in a temporary folder
#
# It needs python3 with torch and transformers, and no network. What else mpt imports and the machine
# lacks it takes from tests/bench/wheels/, if that is there; bring nothing that the machine has. To fill
# it on a machine with a network, for Python 3.12:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d tests/bench/wheels \
#       'omegaconf>=2.4' pyyaml zstandard
set -uo pipefail
cd "$(dirname "$0")/../.."
brought="$(mktemp -d)"
trap 'rm -rf "$brought"' EXIT
if compgen -G 'tests/bench/wheels/*.whl' > /dev/null; then
    # A wheel is an archive of what is to be imported: nothing of the machine is changed.
    for wheel in tests/bench/wheels/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$brought"; done
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$brought"
export TORCHINDUCTOR_CACHE_DIR="$brought/inductor"

"${PYTHON:-python3}" -m tests.bench.gpu "$@"
