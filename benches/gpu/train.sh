#!/usr/bin/env bash
# The trainer on a machine with one NVIDIA GPU, offline: CUDA works, a full-size step against eager PyTorch, the shipped
# model and the ablation table trained on phantoms, judged on phantoms of wider ranges. Prints a table last.
#
#   benches/gpu/train.sh DARNET_TRAIN OUT [WORK]
#
# DARNET_TRAIN is the binary of `cargo build --release --features trainer --bin darnet-train`; it finds libtorch where it
# was built, or through LD_LIBRARY_PATH (the lib folder of a Python package of torch 2.11.0 with CUDA, and those of
# nvidia/*). OUT gets at most eight flat files. WORK (default /dev/shm/darnet-train) holds caches and runs: the same
# command goes on there with what an earlier one left. Needs python3 with torch 2.11 and numpy for the comparison.
#
# Environment, with defaults:
#   STEPS=compare,train       which parts
#   BUDGET=185                seconds for everything; trainings end with their best epoch when they run out
#   TRAIN_COUNT=500 TEST_COUNT=160 SIDE=128 SEED=1    phantoms
#   WIDTH=16 BATCH=16 PRECISION=bf16                  the shipped network and how it is trained
#   COMPARE="1:8 8:4"         batch sizes of the comparison, with the steps of a round
#   ABLATION_JOBS=5           processes that share the GPU beside the shipped model's
#   MAIN_EPOCHS= ABLATION_EPOCHS=    set, or chosen from the measured speed
set -uo pipefail
cd "$(dirname "$0")/../.."

binary=${1:?usage: benches/gpu/train.sh DARNET_TRAIN OUT [WORK]}
out=${2:?usage: benches/gpu/train.sh DARNET_TRAIN OUT [WORK]}
work=${3:-/dev/shm/darnet-train}
binary=$(readlink -f "$binary")
mkdir -p "$out" "$work"
out=$(readlink -f "$out")
work=$(readlink -f "$work")

STEPS=${STEPS:-compare,train}
BUDGET=${BUDGET:-185}
TRAIN_COUNT=${TRAIN_COUNT:-500} TEST_COUNT=${TEST_COUNT:-160} SIDE=${SIDE:-128} SEED=${SEED:-1}
WIDTH=${WIDTH:-16} BATCH=${BATCH:-16} PRECISION=${PRECISION:-bf16} ABLATION_JOBS=${ABLATION_JOBS:-5}
DEVICE=${DEVICE:-cuda:0}
readonly INPUT=32,96,96 KEEP_FOR_JUDGING=35

SECONDS=0
log=$out/log.txt
table=$out/table.txt
: >"$log"
: >"$table"
say() { echo "[$SECONDS s] $*" | tee -a "$log"; }
row() { echo "$*" >>"$table"; }
has() { [[ ,$STEPS, == *,$1,* ]]; }
left() { echo $((BUDGET - SECONDS - ${1:-0})); }
# Runs a command for at most so many seconds; a signal lets it write a checkpoint first.
within() {
    local limit=$1
    shift
    [ "$limit" -gt 1 ] || return 124
    timeout --signal=INT --kill-after=8 "$limit" "$@"
}

cores=$(nproc)
if [ "$cores" -ge 8 ]; then
    front="taskset -c 0-2" behind="taskset -c 3-$((cores - 1))" workers=$((cores - 3))
else
    front="" behind="" workers=$cores
fi

row "machine: $cores cores, $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null |
    head -1 || echo no GPU)"
row "program: $("$binary" --version 2>&1)"

# Phantoms are made beside the comparison, on the other cores.
maker=
if has train; then
    (
        for set in train test; do
            count=$TRAIN_COUNT
            [ "$set" = test ] && count=$TEST_COUNT
            began=$SECONDS
            $behind nice -n 19 "$binary" prepare --format phantom --count "$count" --seed "$SEED" --ranges "$set" \
                --size "$SIDE" --input "$INPUT" --workers "$workers" --no-sheets --out "$work/cache-$set" || exit 1
            echo "$set $count $((SECONDS - began))" >>"$work/made.txt"
        done
    ) >"$work/prepare.log" 2>&1 &
    maker=$!
fi

# 1. CUDA tensors work.
say "a small step on $DEVICE"
if ! small=$(within 60 "$binary" bench --device "$DEVICE" --input 16,56,56 --batch 2 --width 8 --steps 3 --tune off 2>&1); then
    say "failed: $small"
    row "CUDA does not work: $small"
    cat "$table"
    exit 1
fi
say "$small"

# 2. The full-size step.
if has compare; then
    row "full-size step (64 x 224 x 224, bf16, channels last, augmentation on the device), in turn, 5 rounds, medians:"
    for setting in ${COMPARE:-1:8 8:4}; do
        batch=${setting%:*} steps=${setting#*:}
        say "comparing at batch $batch"
        if within "$(left 90)" $front python3 benches/train/compare.py "$binary" --device cuda --precision bf16 \
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
fi

# 3b. The shipped model and the ablation.
if has train; then
    say "waiting for the phantoms"
    if ! wait "$maker"; then
        cat "$work/prepare.log" >>"$log"
        row "phantoms could not be made; see log.txt"
        cat "$table"
        exit 1
    fi
    tail -n 4 "$work/prepare.log" >>"$log"
    while read -r set count took; do row "phantoms: $count of the $set ranges in $took s on $workers cores"; done <"$work/made.txt"
    [ -e "$work/split.csv" ] ||
        "$binary" split --cache "$work/cache-train" --test-share 0.2 --folds 5 --seed "$SEED" --out "$work/split.csv" >>"$log"
    net=(--width "$WIDTH")
    device=(--device "$DEVICE" --tune off)
    [ "$DEVICE" = cpu ] || device+=(--precision "$PRECISION")
    step_ms=$("$binary" bench "${net[@]}" --input "$INPUT" --batch "$BATCH" --steps 20 "${device[@]}" 2>>"$log" |
        sed -n 's/.*"step_ms":\([0-9.]*\).*/\1/p')
    # Images that fit into the time; processes side by side do somewhat more than one alone, which launches kernels half
    # of the time. The shipped model gets a fifth of them.
    in_fold=$((TRAIN_COUNT * 8 / 10 * 8 / 10))
    read -r main_epochs ablation_epochs < <(python3 -c "
images = 1.2 * max($(left $KEEP_FOR_JUDGING), 10) * $BATCH / ($step_ms / 1000)
print(min(80, max(6, int(0.2 * images / $in_fold))), min(40, max(4, int(0.8 * images / 20 / $in_fold))))")
    main_epochs=${MAIN_EPOCHS:-$main_epochs} ablation_epochs=${ABLATION_EPOCHS:-$ablation_epochs}
    say "a step of $BATCH takes $step_ms ms: $main_epochs epochs for the shipped model, $ablation_epochs for each of the ablation"
    common=(--cache "$work/cache-train" --split "$work/split.csv" "${net[@]}" --batch "$BATCH" --seed "$SEED"
        --intended-use demo --half-weights "${device[@]}")
    third() { echo $((($1 * 3 + 7) / 8)); }
    trained="$TRAIN_COUNT synthetic chest CT phantoms of the training ranges, seed $SEED"
    limit=$(left "$KEEP_FOR_JUDGING")
    common+=(--time-limit "$limit")
    within $((limit + 15)) "$binary" fit "${common[@]}" --fold 0 --epochs "$main_epochs" --lr-every "$(third "$main_epochs")" \
        --id demo --trained-on "$trained" --out "$work/main" >"$work/main.log" 2>&1 &
    main_fit=$!
    ablation=("$binary" ablate "${common[@]}" --epochs "$ablation_epochs" --lr-every "$(third "$ablation_epochs")"
        --trained-on "$trained" --out "$work/ablation")
    jobs=()
    for i in $(seq 0 $((ABLATION_JOBS - 1))); do
        within $((limit + 15)) "${ablation[@]}" --share "$i/$ABLATION_JOBS" >"$work/ablation-$i.log" 2>&1 &
        jobs+=($!)
    done
    wait "$main_fit" || say "the shipped model is not finished"
    for job in "${jobs[@]}"; do wait "$job" || say "a share of the ablation is not finished"; done
    for f in "$work"/main.log "$work"/ablation-*.log; do
        grep -v Warning "$f" | tail -n 4 >>"$log"
    done
    row "small net (width $WIDTH, 32 x 96 x 96, $PRECISION, batch $BATCH): $step_ms ms a step; $main_epochs and $ablation_epochs epochs"
    say "judging"
    # As many whole folds as there are.
    for folds in 0,1,2,3,4 0,1,2,3 0,1,2 0,1 0; do
        whole=1
        for fold in ${folds//,/ }; do
            for variant in none ca da both; do [ -e "$work/ablation/$variant/fold-$fold/summary.json" ] || whole=0; done
        done
        [ "$whole" = 1 ] || continue
        "${ablation[@]}" --folds "$folds" >"$work/ablation.md" 2>>"$log"
        row "ablation over folds $folds, validation scans:"
        grep -A 7 '^## Ablation' "$work/ablation.md" | tail -n +3 >>"$table"
        break
    done
    if [ -e "$work/main/summary.json" ]; then
        grep 'best epoch' "$work/main.log" >>"$table"
        within 30 "$binary" evaluate "$work/main" --cache "$work/cache-test" --out "$work/evaluation-wide" \
            --batch 32 "${device[@]:0:4}" >"$work/wide.md" 2>>"$log"
        within 30 "$binary" evaluate "$work/main" --cache "$work/cache-train" --split "$work/split.csv" \
            --out "$work/evaluation-train-ranges" --batch 32 "${device[@]:0:4}" >"$work/near.md" 2>>"$log"
        if within 30 "$binary" calibrate "$work/main" --cache "$work/cache-train" --split "$work/split.csv" --fold 0 \
            --out "$work/main/model/demo.toml" --picture "$work/main/reliability.png" >"$work/calibrate.md" 2>>"$log"; then
            cat "$work/calibrate.md" >>"$table"
        fi
        row "shipped model on $TEST_COUNT phantoms of the test ranges, then on the held-out fifth of the training ranges:"
        grep -h '^| main' "$work/wide.md" "$work/near.md" >>"$table"
    fi
    models=()
    for variant in none ca da both; do
        [ -e "$work/ablation/$variant/fold-0/summary.json" ] && models+=("$variant=$work/ablation/$variant/fold-0")
    done
    [ -e "$work/main/summary.json" ] && models+=("shipped=$work/main")
    if [ "${#models[@]}" -gt 0 ] && within 40 "$binary" cam "${models[@]}" --cache "$work/cache-test" \
        --out "$work/cam" >"$work/cam.md" 2>>"$log"; then
        grep '^|' "$work/cam.md" >>"$table"
    fi

    cd "$work"
    tar cf "$out/shipped.tar" --exclude='checkpoint.safetensors' --exclude='events.*' main split.csv 2>>"$log"
    tar czf "$out/ablation.tar.gz" --exclude='*.safetensors' --exclude='events.*' ablation 2>>"$log"
    tar cf "$out/models-a.tar" ablation/none/fold-0/model ablation/ca/fold-0/model 2>>"$log"
    tar cf "$out/models-b.tar" ablation/da/fold-0/model ablation/both/fold-0/model 2>>"$log"
    # Larger files do not travel.
    find "$out" -size +15M -delete
    tar czf "$out/evaluation.tar.gz" $(ls -d evaluation-* cam ./*.log ./*.md cache-*/report.csv 2>/dev/null) 2>>"$log"
fi
row "took $SECONDS s"
echo
cat "$table"
