#!/usr/bin/env bash
# The trainer on a machine with one NVIDIA GPU, offline: CUDA tensors work, and a full-size step against eager PyTorch, in
# turn. Prints a table last. (scripts/demo-model with DEVICE=cuda trains a whole model.)
#
#   benches/gpu/train.sh DARNET_TRAIN OUT
#
# DARNET_TRAIN is the binary of `cargo build --release --features trainer --bin darnet-train`; it finds libtorch where it
# was built, or through LD_LIBRARY_PATH (the lib folder of a Python package of torch 2.11.0 with CUDA, and those of
# nvidia/*). OUT gets log.txt, table.txt and compare.json. Needs python3 with torch 2.11 and numpy.
#
# Environment, with defaults:
#   BUDGET=185               seconds for everything
#   COMPARE="1:8 8:4"        batch sizes, with the steps of a round
#   DEVICE=cuda:0
set -uo pipefail
cd "$(dirname "$0")/../.."

binary=$(readlink -f "${1:?usage: benches/gpu/train.sh DARNET_TRAIN OUT}")
out=${2:?usage: benches/gpu/train.sh DARNET_TRAIN OUT}
mkdir -p "$out"
BUDGET=${BUDGET:-185} DEVICE=${DEVICE:-cuda:0}

SECONDS=0
log=$out/log.txt
table=$out/table.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$log"
: >"$table"
say() { echo "[$SECONDS s] $*" | tee -a "$log"; }
row() { echo "$*" >>"$table"; }
# Runs a command for at most so many seconds.
within() {
    local limit=$1
    shift
    [ "$limit" -gt 1 ] || return 124
    timeout --signal=INT --kill-after=8 "$limit" "$@"
}

row "machine: $(nproc) cores, $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null |
    head -1 || echo no GPU)"
row "program: $("$binary" --version 2>&1)"

say "a small step on $DEVICE"
if ! small=$(within 60 "$binary" bench --device "$DEVICE" --input 16,56,56 --batch 2 --width 8 --steps 3 --tune off 2>&1); then
    say "failed: $small"
    row "CUDA does not work: $small"
    cat "$table"
    exit 1
fi
say "$small"

row "full-size step (64 x 224 x 224, bf16, channels last, augmentation on the device), in turn, 5 rounds, medians:"
for setting in ${COMPARE:-1:8 8:4}; do
    batch=${setting%:*} steps=${setting#*:}
    say "comparing at batch $batch"
    if within $((BUDGET - SECONDS)) python3 benches/train/compare.py "$binary" --device cuda --precision bf16 \
        --channels-last on --augment --batch "$batch" --steps "$steps" --rounds 5 \
        --json "$work/compare-$batch.json" >"$work/compare.txt" 2>>"$log"; then
        sed "s/^/  batch $batch: /" "$work/compare.txt" | tee -a "$log" >>"$table"
    else
        say "batch $batch: not done"
        row "  batch $batch: not done"
    fi
done
python3 - "$work" >"$out/compare.json" <<'PY'
import json, pathlib, sys
files = sorted(pathlib.Path(sys.argv[1]).glob("compare-*.json"))
print(json.dumps([json.loads(f.read_text()) for f in files], indent=1))
PY
row "took $SECONDS s"
echo
cat "$table"
