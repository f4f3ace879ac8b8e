#!/bin/bash
# nano from nothing to packed weights. Planned for about five hours on two CPU cores; README.md says what is measured.
# Run it from the repository's root. It needs pip install -e '.[train]', WordNet (Debian's wordnet-base), and
# data/pictures, data/icons.parquet and data/unlabelled.parquet as data/SOURCES.md describes them.
set -euo pipefail
microvlm() { python -m microvlm "$@"; }
recipes=recipes/nano
runs=runs/nano
seen=data/pictures/validation_seen.parquet  # new drawings of known things, not trained on

# the parts: vision tower and language model, each from nothing
microvlm train $recipes/vision.yaml
microvlm train $recipes/text.yaml
microvlm compose --vision $runs/vision/model.safetensors --text $runs/text --variant nano --out $runs/start

# captions, then captions and memory together
microvlm train $recipes/captions.yaml
microvlm train $recipes/memory.yaml

# temperature and the thresholds of ScopeNet, then 1.6 bits a weight
microvlm calibrate $runs/memory $runs/calibrated --data $seen --look-alikes 0.05
microvlm pack $runs/calibrated $runs/packed --recipe $recipes/pack.yaml --data data/mini/validation.parquet

# what came of it
microvlm evaluate --model $runs/packed --data $seen --memory
