#!/usr/bin/env bash
# ./run.sh [flags of train.py]: trains on every chosen GPU, the way `accelerate config` was answered, if it was.
set -euo pipefail
cd "$(dirname "$0")"
exec python -m mlm.runtime.launch "$@"
