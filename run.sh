#!/usr/bin/env bash
# ./run.sh [flags of train.py]: trains on every chosen GPU, the way `accelerate config` was answered, if it was.
set -euo pipefail
cd "$(dirname "$0")"

for flag; do
    case $flag in -h | --help) exec python train.py --help ;; esac
done

# In one process first: a wrong setting or text is one plain message here, not a launcher's traceback.
python train.py --check_only "$@" > /dev/null

facts=$(python -c '
from Config import parse_flags
from machine import choose_devices, count_gpus, native_precision
config = parse_flags()
choose_devices(config)
print(count_gpus(), native_precision(), config.cuda_visible_devices.replace(" ", ""))' "$@")
read -r gpus precision devices <<< "$facts"

launch=()
configuration=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/accelerate/default_config
if [ -f "$configuration.yaml" ] || [ -f "$configuration.json" ]; then
    [ -z "$devices" ] || launch=(--gpu_ids all --num_processes "$gpus") # of those that cuda_visible_devices names
elif [ "$gpus" = 0 ]; then
    launch=(--cpu --num_processes 1 --num_machines 1 --mixed_precision "$precision" --dynamo_backend no)
else
    launch=(--num_processes "$gpus" --num_machines 1 --mixed_precision "$precision" --dynamo_backend no)
fi
[ -z "$devices" ] || export CUDA_VISIBLE_DEVICES=$devices
exec accelerate launch ${launch[@]+"${launch[@]}"} train.py "$@"
