#!/bin/bash
# The study of width 256, and of 128 with what time is left, on one GPU within a number of seconds.
#
#     bash benchmarks/quality/on_gpu.sh CORPUS OUT SECONDS [flags for study.py]
#
# CORPUS is a directory that study.py made (corpus.json, tokenizer/ and streams.npz are enough; see
# corpus.pack). OUT gets results.tgz, fp-SEED.tgz (floating-point models) and logs.
set -u
corpus=$1 out=$2 seconds=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=2
work=$(mktemp -d)
mkdir -p "$out"

collect() {
    cd "$work" || return
    for seed in d256/seed-*; do
        [ -d "$seed/fp" ] && tar czf "$out/fp-${seed##*-}.tgz" "$seed/fp"
    done
    tar czf "$out/results.tgz" --exclude='*.lock' --exclude=fp --exclude='qat-*/' \
        --exclude=latents ./*/study.json ./*/seed-*/*.* 2>/dev/null
}
trap collect EXIT

timeout 90 python3 "$here/probe.py" --corpus "$corpus" --seconds $((seconds - 35)) \
    -o "$out/probe.json" >"$work/flags" 2>"$out/probe.log"
[ -s "$work/flags" ] || echo "--fp-tokens 24000000 --more-tokens 6000000 --search-tokens 3000000" \
    "--lanes 1 --processes 10 --eager" >"$work/flags"
cat "$work/flags" "$out/probe.log"
for width in 256 128; do
    left=$((seconds - SECONDS - 10))
    [ $left -gt 30 ] || break
    # shellcheck disable=SC2046
    python3 "$here/study.py" -o "$work/d$width" --corpus "$corpus" --hidden $width --half \
        --eval-tokens 131072 --fp-batch 32 --batch 32 --kinds fp search trained --device cuda \
        --threads 1 --seconds $left $(cat "$work/flags") "$@" 2>&1 | grep -v "Writing model" |
        tee "$out/study-d$width.log"
done
