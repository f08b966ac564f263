#!/usr/bin/env bash
# Trains the embedded model from nothing: data, three stages, package folder.
#
# Usage:  recipes/embedded/train.sh [TARGET]
#
# TARGET is the folder of the finished model (default: models/embedded/packed). What is finished is
# skipped, and what was stopped goes on, so the same command resumes it. Needs pip install -e ".[train]".
# PROCESSES=2 divides the batches of stage 3 among two processes, such as one per core.
#
# To begin with stage 3, on the encoders and the depth tokenizer of the shipped model:
#   python -m recipes.embedded.encoders vpt/embedded models/embedded/2-perception
#   mkdir -p data/perception && cp -r vpt/embedded/depth_tokenizer data/perception/depth-tokenizer
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
run $scenes/singles/heldout/annotations.json \
  python -m recipes make-counting-scenes --out $scenes/singles --num 20000 --heldout 600 --size 280 --one-of-each
tokenizer=$scenes/depth-tokenizer
if [ ! -e $tokenizer/model.safetensors ]; then
  run $scenes/all-codes/model.safetensors vpt depth-tokenizer train --maps $scenes/rooms/train/depth \
    --heldout $scenes/rooms/heldout/depth --steps 1000 --batch-size 4 --out $scenes/all-codes
  run $tokenizer/model.safetensors python -m recipes.embedded.codes $scenes/all-codes $tokenizer --keep 24
fi

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
  --counting $scenes/singles/train $scenes/counting/train --out $rows/train

# Training

launch="python -m"
stage() { run "$models/$2/model.safetensors" $launch "recipes.embedded.$1" "$configs/$2.yaml"; }

if [ ! -e $models/2-perception/model.safetensors ]; then
  stage vision 1-vision
  stage vision 2-perception
fi
run $models/3-start/config.json vpt init --base $models/2-perception --dtype float32 --content depth,boxes \
  --depth-tokenizer $tokenizer --out $models/3-start
vpt set $models/3-start --mask none --own-tower-pixels 78400 --stems frozen --reset-conditioning clip,dino,sam --seed 1
[ "${PROCESSES:-1}" = 1 ] || launch="torchrun --standalone --nproc-per-node $PROCESSES -m"
stage language 3-language

# Package

small=$scenes/small-tokenizer
run $small/model.safetensors python -m recipes.embedded.shrink $tokenizer $small --maps $scenes/rooms/train/depth \
  --heldout $scenes/rooms/heldout/depth
run "$target/config.json" python -m recipes.embedded.pack $models/3-language "$target" --depth-tokenizer $small
python -m recipes.embedded.inputs --kinds data/embedded/train $rows/depth/marked $scenes/counting/train/images \
  --heldout data/embedded/heldout data/embedded/points-3/marked $scenes/counting/heldout/images --model "$target"
echo "the model is in $target"
