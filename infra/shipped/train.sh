#!/usr/bin/env bash
# Makes the shipped models from photographs to the folders in pipelines/pretrained: pairs, regression, one-step model,
# evaluation, release. Every step is a job that can be typed; each continues where it was stopped, and does nothing again.
#
#   infra/shipped/train.sh PHOTOS TESTS WORK
#
# PHOTOS: folder of the training photographs (held_out.txt names those of them that are kept for the evaluation).
# TESTS: folder with set5/ and bsd100/. WORK: where everything is written. Settings, by environment variable:
#   STEPS=10000        of the regression; the denoiser takes half of them, the variant for real images the same on top
#   ENGINE=local       or ray, with FLAGS such as "--num-workers 4 --use-gpu"
#   PRECISION=bf16     float32 where the processor has no bf16
#   NIQE=FILE          niqe_pris_params.npz, for NIQE in the cards
#   TABLE=1            also a teacher of many steps, what is distilled from it, and few_steps.md of the three (needs NIQE)
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 3 ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
photos=$1 tests=$2 work=$3 table=${TABLE:-0}
[ "$table" != 1 ] || : "${NIQE:?must name niqe_pris_params.npz where TABLE=1}"
python=${PYTHON:-.venv/bin/python}
steps=${STEPS:-10000} engine=${ENGINE:-local} precision=${PRECISION:-bf16}
read -ra flags <<< "${FLAGS:-}"
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$work/mlflow.db}

# What a phone, a web page or an old archive holds: blur, resizing, noise and JPEG, all mild.
everyday='{"name": "real", "settings": {"blur": [0.2, 1.8], "blur_2": [0.0, 1.0], "sinc": 0.05, "sinc_last": 0.3,
  "resize": [0.7, 1.2], "resize_2": [0.7, 1.2], "noise": [0.0, 10.0], "noise_2": [0.0, 6.0], "shot": [0.0, 0.5],
  "quality": [50.0, 97.0], "quality_2": [60.0, 97.0]}}'

mkdir -p "$work/held-out" "$work/photos"
for file in "$photos"/*.jpg; do
  folder=photos
  grep -qxF "$(basename "$file")" infra/shipped/held_out.txt && folder=held-out
  [ -e "$work/$folder/$(basename "$file")" ] || cp "$file" "$work/$folder/"
done

"$python" -m infra.shipped.dead_leaves --output "$work/photos/leaves" --count 100

pairs() { # NAME DEGRADATION
  "$python" jobs/make_pairs.py --source "$work/photos" --output "$work/pairs-$1" --degradation "$2" --patch 128 \
    --crops random --reductions 1,2,3,4 --max-per-image 80 --min-deviation 6 --val-share 0.075 --test-share 0 --engine "$engine"
}
train() { # NAME FLAGS...
  local name=$1; shift
  "$python" jobs/train.py --output "$work/$name" --crop 96 --precision "$precision" --engine "$engine" \
    --checkpoint-every 500 --log-every 100 --val-pairs 32 "${flags[@]}" "$@"
}
release() { # NAME RUNS... (NAME-real is scored on what it is for, beside NAME)
  local name=$1 inputs=(); shift
  [[ $name = *-real ]] && inputs=(--degradation "$everyday" --against "pipelines/pretrained/${name%-real}")
  for set in set5 bsd100 held-out; do
    local images=$tests/$set
    [ "$set" = held-out ] && images=$work/held-out
    "$python" jobs/evaluate.py --model "$work/$name/model" --dataset "$images" --output "$work/evaluations/$name/$set" \
      --engine "$engine" --samples 2 --precision "$precision" ${NIQE:+--niqe "$NIQE"} "${inputs[@]}"
  done
  "$python" jobs/evaluate.py --model "$work/$name/model" --dataset "$tests/set5" --output "$work/evaluations/$name/dial" \
    --engine "$engine" --precision "$precision" ${NIQE:+--niqe "$NIQE"} "${inputs[@]:0:2}" \
    --search-start-levels 0,0.3,0.5,0.6,0.7,0.8,0.9
  "$python" -m infra.shipped.release --work "$work" --name "$name" --runs "$@"
}

pairs bicubic bicubic
pairs real "$everyday"
train regression --preset anchored-x4-regression --pairs "$work/pairs-bicubic" --steps "$steps"
train diffsr-x4 --preset anchored-x4 --pairs "$work/pairs-bicubic" --init "$work/regression/model" \
  --one-step --diversity 0.8 --start-level 0.6 --encoder-steps 0 --steps $((steps / 2))
release diffsr-x4 regression diffsr-x4
train regression-real --preset anchored-x4-regression --pairs "$work/pairs-real" --init "$work/regression/model" \
  --steps $((steps / 2)) --learning-rate 2e-3
train diffsr-x4-real --preset anchored-x4 --pairs "$work/pairs-real" --init "$work/regression-real/model" \
  --one-step --diversity 0.8 --start-level 0.8 --encoder-steps 0 --steps $((steps / 2))
release diffsr-x4-real regression regression-real diffsr-x4-real

[ "$table" = 1 ] || exit 0
train teacher --preset anchored-x4 --pairs "$work/pairs-bicubic" --init "$work/regression/model" \
  --encoder-steps 0 --steps $((steps * 2 / 5))
train distilled --preset anchored-x4 --pairs "$work/pairs-bicubic" --teacher "$work/teacher/model" --steps $((steps * 3 / 20))
"$python" jobs/evaluate.py --model "$work/teacher/model" --dataset "$work/held-out" --limit 4 --output "$work/evaluations/teacher/search" \
  --engine "$engine" --precision "$precision" --niqe "$NIQE" --search-steps 1,2,4,8 --objective niqe --store
"$python" -m tests.benchmarks.few_steps --student "$work/diffsr-x4/model" --teacher "$work/teacher/model" \
  --distilled "$work/distilled/model" --set5 "$tests/set5" --bsd100 "$tests/bsd100" --niqe "$NIQE" \
  --cache "$work/few_steps" > "$work/few_steps.md"
