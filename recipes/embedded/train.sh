#!/usr/bin/env bash
# Trains the embedded model from nothing: data, eight stages, package folder.
#
# Usage:  recipes/embedded/train.sh [TARGET]
#
# TARGET is the folder of the finished model (default: models/embedded/packed). What is finished is
# skipped, and what was stopped goes on, so the same command resumes it. Needs pip install -e ".[train]".
set -euo pipefail
cd "$(dirname "$0")/../.."

target=${1:-models/embedded/packed}
models=models/embedded
scenes=data/perception
rows=data/drawing
configs=configs/embedded

# run FILE COMMAND...: the command, unless the file that it ends with is there
run() {
  local file=$1
  shift
  if [ -e "$file" ]; then
    echo "done: $file"
  else
    echo "+ $*"
    "$@"
    [ -e "$file" ] || { echo "error: $1 ended without $file" >&2; exit 1; }
  fi
}

# Data

run data/embedded/dataset_info.json python -m recipes make-embedded --out data/embedded
run $scenes/rooms/heldout/objects.jsonl python -m recipes make-scenes --out $scenes/rooms --num 12000 --heldout 600 --size 280
run $scenes/counting/heldout/annotations.json \
  python -m recipes make-counting-scenes --out $scenes/counting --num 20000 --heldout 600 --size 280
run $scenes/all-codes/model.safetensors vpt depth-tokenizer train --maps $scenes/rooms/train/depth \
  --heldout $scenes/rooms/heldout/depth --steps 1000 --batch-size 4 --out $scenes/all-codes
tokenizer=$scenes/depth-tokenizer
run $tokenizer/model.safetensors python -m recipes.embedded.codes $scenes/all-codes $tokenizer --keep 24

depth_rows() { # depth_rows FOLDER SPLIT OPTIONS...
  local folder=$1 split=$2
  shift 2
  run "$folder/dataset_info.json" vpt data make-depth-rows --scenes "$scenes/rooms/$split" --tokenizer $tokenizer \
    --scale 1.5 --skip-bad --out "$folder" "$@"
}
counting_rows() { # counting_rows FOLDER SPLIT
  run "$1/dataset_info.json" vpt data make-counting-rows "$scenes/counting/$2/annotations.json" \
    --images "$scenes/counting/$2/images" --out "$1"
}
depth_rows $rows/depth train
counting_rows $rows/count train
for points in 2 3 5; do
  depth_rows data/embedded/points-$points heldout --points $points --seed $points
done
counting_rows data/embedded/counting heldout
run $rows/train/dataset_info.json python -m recipes.embedded.drawing --rows $rows/depth $rows/count \
  --counting $scenes/counting/train --out $rows/train
run data/embedded/drawings/dataset_info.json python -m recipes.embedded.mixture \
  $rows/train/depth_maps.jsonl=0.2 $rows/train/all_boxes.jsonl=0.6 $rows/train/all_points.jsonl=0.2 \
  --steps 2400 --out data/embedded/drawings
run data/embedded/answers/dataset_info.json python -m recipes.embedded.mixture \
  data/embedded/instructions.jsonl=0.2 data/embedded/looks.jsonl=0.06 data/embedded/listings.jsonl=0.06 \
  data/embedded/easy.jsonl=0.09 $rows/train/depth_maps.jsonl=0.06 $rows/train/boxes.jsonl=0.09 \
  $rows/train/depth_steps.jsonl=0.24 $rows/train/count_steps.jsonl=0.2 --steps 4000 --out data/embedded/answers

# Training

vision() { run "$models/$1/model.safetensors" python -m recipes.embedded.vision "$configs/$1.yaml"; }
language() { run "$models/$1/model.safetensors" llamafactory-cli train "$configs/$1.yaml"; }
with_muon() { run "$models/$1/model.safetensors" python -m recipes.embedded.muon "$configs/$1.yaml"; }

vision 1-vision
language 2-captions
language 3-instructions
vpt set $models/3-instructions --mask none
with_muon 4-listings
vpt set $models/4-listings --mask question --mask-ratio 0.9 --reset-conditioning dino,sam --seed 1
with_muon 5-looks
vision 6-perception
run $models/7-start/config.json vpt init --base $models/6-perception --dtype float32 --content depth,boxes \
  --depth-tokenizer $tokenizer --out $models/7-start
vpt set $models/7-start --mask none --own-tower-pixels 78400 --alignment on --stems trained
with_muon 7-drawings
vpt set $models/7-drawings --alignment off --stems frozen --reset-conditioning clip --seed 1
with_muon 8-answers

# Package

small=$scenes/small-tokenizer
run $small/model.safetensors python -m recipes.embedded.shrink $tokenizer $small --maps $scenes/rooms/train/depth \
  --heldout $scenes/rooms/heldout/depth
run "$target/config.json" python -m recipes.embedded.pack $models/8-answers "$target" --depth-tokenizer $small
python -m recipes.embedded.inputs --kinds data/embedded/stage-3 $rows/depth/marked $scenes/counting/train/images \
  --heldout data/embedded/heldout data/embedded/points-3/marked $scenes/counting/heldout/images --model "$target"
echo "the model is in $target"
