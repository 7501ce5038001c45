#!/usr/bin/env bash
# Simulate clips and train a video model on a lent machine without network, within a time limit. Called again, it goes on.
#
#   OUT=DIR tools/gpu.sh MINUTES [KEY=VALUE ...]        KEY=VALUE: settings as for `vpenc pretrain --set`
#
# MINUTES is the limit of this call, simulation and packing included. OUT gets few, flat files: run.tar.gz (config, card, log, pictures)
# and the weights as model.safetensors.000, .001, ... of at most 15 MB each. To have a model folder:
#   mkdir model; tar xzf OUT/run.tar.gz -C model --strip-components 2 ./model; cat OUT/model.safetensors.??? > model/model.safetensors
# (its config.json has the SHA-256, which loading checks).
# Environment: WORK     scratch folder with clips and checkpoints: a call goes on with what it finds there (default: /tmp/vpenc-gpu)
#              SAVE=1   put the checkpoints of an unfinished run into OUT as well, in pieces (three times the float32 weights)
#              RESUME   OUT of an earlier call with SAVE=1, for a machine whose WORK is empty
#              TOTAL    minutes of training over all calls, which the learning rates follow (default: what fits into this call)
#              PRESET   tiny, small or bair (default: small)
#              CLIPS    simulated clips, a tenth of them for testing (default: 4000)
#              DATA     clips that are there already, instead of simulating
#              PYTHON   (default: python3)      DEVICE (default: cuda if there is one)
set -euo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: OUT=DIR tools/gpu.sh MINUTES [KEY=VALUE ...]}; shift
: "${OUT:?OUT must name the folder of the results}"
python=${PYTHON:-python3} preset=${PRESET:-small} clips=${CLIPS:-4000} work=${WORK:-/tmp/vpenc-gpu}
run=$work/run
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MPLBACKEND=Agg
mkdir -p "$OUT" "$run"

left() { awk -v limit="$limit" -v spent="$SECONDS" 'BEGIN { print limit - spent / 60 }'; }  # minutes

unpack() {  # the checkpoints that an earlier call packed, unless this machine has its own
    [ -e "$run/config.json" ] || [ -z "${RESUME:-}" ] || [ ! -e "$RESUME/checkpoints.tar.000" ] || {
        tar xzf "$RESUME/run.tar.gz" -C "$run"
        cat "$RESUME"/checkpoints.tar.[0-9][0-9][0-9] | tar x -C "$run"
    }
}

pack() {
    [ -e "$run/config.json" ] || return 0
    rm -f "$OUT"/run.tar.gz "$OUT"/model.safetensors.* "$OUT"/checkpoints.tar.*
    tar czf "$OUT/run.tar.gz" -C "$run" --exclude '*.pt' --exclude '*.safetensors' --exclude './codes' --exclude '*.lock' --exclude './.*' .
    if [ -e "$run/model/model.safetensors" ]; then split -b 15000000 -d -a 3 "$run/model/model.safetensors" "$OUT/model.safetensors."; fi
    if [ -n "${SAVE:-}" ] && [ ! -e "$run/finished.json" ]; then
        (cd "$run" && tar c -- *.pt $(ls -d vqvae 2> /dev/null)) | split -b 15000000 -d -a 3 - "$OUT/checkpoints.tar."
    fi
}

unpack
trap pack EXIT
trap 'exit 143' TERM
if [ -z "${DATA:-}" ]; then
    DATA=$work/sim-bair-$clips.h5
    [ -e "$DATA" ] || "$python" -c "
from vpenc.data.sim import generate_clips
generate_clips('$DATA', $clips - $clips // 10, $clips // 10)"
fi
if [ ! -e "$run/settings" ]; then  # the first call decides; later ones must not change it
    total=${TOTAL:-$(awk -v left="$(left)" 'BEGIN { print (left > 3 ? left - 1.5 : left * .5) }')}
    awk -v m="$total" 'BEGIN { printf "minutes=%.4g,%.4g,%.4g\n", .35 * m, .1 * m, .55 * m }' > "$run/settings"
    for setting in "$@"; do echo "$setting" >> "$run/settings"; done
fi
arguments=()
while read -r setting; do arguments+=(--set "$setting"); done < "$run/settings"
reserve=$(awk -v limit="$limit" 'BEGIN { print (limit > 5 ? .7 : limit * .15) }')  # for packing
status=0
"$python" -c 'import sys; from vpenc.cli import main; sys.exit(main())' pretrain "$DATA" --preset "$preset" --out "$run" ${DEVICE:+--device "$DEVICE"} \
    --stop-after "$(awk -v left="$(left)" -v reserve="$reserve" 'BEGIN { print (left > reserve ? left - reserve : .01) }')" "${arguments[@]}" || status=$?
[ $status = 130 ] && echo "not finished: call again, with RESUME if the machine is another one" && exit 0
exit $status
