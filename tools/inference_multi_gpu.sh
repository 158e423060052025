#!/usr/bin/env bash
# Make the videos of a request file, on all GPUs of this machine:
#
#     tools/inference_multi_gpu.sh CONFIG PRETRAINED REQUEST OUTPUT_DIR [OPTIONS of kairos generate]
#     tools/inference_multi_gpu.sh configs/kairos_4b/kairos_4b_config.py none examples/kairos/example_list.json output/multi_gpu
#
# PRETRAINED is as in inference.sh. Each GPU takes the next request when it is free; what is made is skipped when the
# command runs again. --gpus N takes fewer GPUs, --device cpu --gpus N runs without any.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 CONFIG PRETRAINED|none REQUEST.json OUTPUT_DIR [OPTIONS of kairos generate]" >&2
    exit 2
fi
exec "$(dirname "$0")/inference.sh" "$1" "$2" "$3" "$4" --gpus all "${@:5}"
