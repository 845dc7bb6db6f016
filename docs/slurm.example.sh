#!/bin/bash
# One task a budget: sbatch --array=0-1 slurm.example.sh. All of them want the same ranking: the first one scores, the
# others wait for it and take it. A task that is ended before its time, or moved, is queued again and goes on.
#SBATCH --job-name=optin
#SBATCH --array=0-1
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

OPTIN=${OPTIN:-optin}
MODEL=${MODEL:-./my-bert}
TRAIN=${TRAIN:-reviews/train.csv}
TEST=${TEST:-reviews/test.csv}
OUT=${OUT:-build}
read -ra BUDGETS <<< "${BUDGETS:-0.8 0.6}"
BUDGET=${BUDGETS[${SLURM_ARRAY_TASK_ID:-0}]}
LOG=$OUT/task-$BUDGET.log
mkdir -p "$OUT"

# The scheduler's SIGTERM goes to this script: it is handed on, and the command keeps what is finished.
child=
trap '[ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM

run() {
    code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    # a trap ends `wait` early: the command itself is still at it
    while kill -0 "$child" 2> /dev/null; do wait "$child" && code=0 || code=$?; done
    child=
    if [ "$code" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ "$code" -eq 0 ] || exit "$code"
}

run $OPTIN prune "$MODEL" --data "$TRAIN" --flops "$BUDGET" --ranking "$OUT/ranking.h5" -o "$OUT/m-$BUDGET" \
    --update -q --log-file "$LOG" ${PRUNE:-}
run $OPTIN eval "$OUT/m-$BUDGET" --baseline "$MODEL" --data "$TEST" --split test --json -q --log-file "$LOG" \
    > "$OUT/m-$BUDGET.eval.part"
mv "$OUT/m-$BUDGET.eval.part" "$OUT/m-$BUDGET.eval.json"
