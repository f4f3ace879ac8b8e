#!/bin/bash
# nano from nothing: from public packages to the weights at the root, which it replaces, without anybody watching.
# Run it from the repository's root, on Debian 12. It needs pip install -e '.[fast,train,pictures,eval]', npm and apt-get update.
# A run that was stopped goes on: finished steps are skipped, the long ones go on from their checkpoint.
set -euo pipefail
export HF_HUB_OFFLINE=1
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184  # keep freed memory: new pages are slow
recipes=recipes/nano
runs=runs/nano
seen=data/pictures/validation_seen.parquet  # new drawings of known things, not trained on
unseen=data/pictures/validation.parquet  # things that are not trained on
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
# print_to FILE MODULE...: a file that is there is whole
print_to() {
    python -m "${@:2}" > "$1.part"
    mv "$1.part" "$1"
}
evaluate() {
    python -m microvlm evaluate --model $runs/packed --data $seen --data $unseen --data data/mini/test.parquet --yardstick data/pictures/train.parquet \
        --memory --facts 1 --facts 64 --queries 96 --json $runs/scores.json --markdown $runs/captions.part
    mv $runs/captions.part $runs/captions.md
}
# replace what the root ships: weights, configuration, tokenizer, where all is from, what it is worth
ship() {
    cp $runs/packed/{*.json,chat_template.jinja,model.safetensors} .
    cat data/pictures/ATTRIBUTION.md $recipes/licences.md > ATTRIBUTION.md
    cp $runs/scores.json $runs/memory_recall.png docs
    python tools/figures.py $runs/*.md
    python -m tests.test_golden
    touch $runs/shipped
}

step data/pictures/ATTRIBUTION.md python -m tools.pictures data/pictures --work $runs/pictures
step $runs/vision/model.safetensors python -m microvlm train $recipes/vision.yaml
step $runs/text/tokenizer.json python -m microvlm train $recipes/text.yaml
step $runs/start python -m microvlm compose --vision $runs/vision/model.safetensors --text $runs/text --variant nano --out $runs/start
step $runs/captions/README.md train captions
step $runs/memory/README.md train memory
step $runs/calibrated python -m microvlm calibrate $runs/memory $runs/calibrated --data $seen --filler data/pictures/train.parquet --look-alikes 0.06
step $runs/packed print_to $runs/pack.txt microvlm pack $runs/calibrated $runs/packed --recipe $recipes/pack.yaml --data data/mini/validation.parquet
step $runs/captions.md evaluate
step $runs/recall.md print_to $runs/recall.md benchmarks.memory_recall --model $runs/packed --draws 4 --sizes 1 4 16 64 256 512 --data $unseen --plot $runs/memory_recall.png
step $runs/text.md print_to $runs/text.md benchmarks.memory_text --model $runs/packed --data $unseen
step $runs/shipped ship
