#!/usr/bin/env bash
# Make the videos of a request file, on one device:
#
#     tools/inference.sh CONFIG PRETRAINED REQUEST OUTPUT_DIR [OPTIONS of kairos generate]
#     tools/inference.sh configs/kairos_4b/kairos_4b_config.py none examples/kairos/example_t2v.json output/t2v
#
# PRETRAINED is a whole model's folder, a LinearDiT's file or folder, or none for the configuration's own model.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 CONFIG PRETRAINED|none REQUEST.json OUTPUT_DIR [OPTIONS of kairos generate]" >&2
    exit 2
fi
config=$1 pretrained=$2 request=$3 output=$4
shift 4

arguments=(generate --config "$config" --request "$request" --output "$output")
if [ -f "$pretrained/model_index.json" ] || [ -f "$pretrained/kairos-model.json" ]; then
    arguments+=(--model "$pretrained")
elif [ "$pretrained" != none ]; then
    arguments+=(--weights "$pretrained")
fi
if command -v kairos >/dev/null; then
    exec kairos "${arguments[@]}" "$@"
fi
exec python3 -m kairos "${arguments[@]}" "$@"
