#!/usr/bin/env bash
# Train the toy world's base model on a bundled subject, on the CPU, and score what it learned:
#     scripts/quickstart.sh [sd|sdxl]
set -euo pipefail
kind="${1:-sd}"
case "$kind" in
    sd) script=train_dreambooth_kronecker.py ;;
    sdxl) script=train_dreambooth_kronecker_sdxl.py ;;
    *) echo "error: '$kind' is not a base model of the quickstart; choose sd or sdxl" >&2 && exit 2 ;;
esac
source "$(dirname "$0")/venv.sh" requirements.txt

base="toyworld/models/$kind"
output="outputs/quickstart/$kind"
accelerate launch --config_file configs/accelerate/cpu.yaml "$script" \
    --config configs/quickstart.yaml --pretrained_model_name_or_path "$base" \
    --output_dir "$output/adapter" --overwrite_output_dir
python scripts/evaluate.py --pretrained_model_name_or_path "$base" \
    --adapter "$output/adapter/pytorch_kronecker_weights.safetensors" \
    --instance_data_dir toyworld/photos/dog --instance_token sks --class_noun dog \
    --prompts configs/prompts/toyworld_dog.txt --num_images 4 --num_inference_steps 20 --guidance_scale 3 \
    --clip_model toyworld/models/clip --dino_model toyworld/models/dino --output_dir "$output/evaluation"

echo
echo "The adapter:               $output/adapter/pytorch_kronecker_weights.safetensors"
echo "While it trained:          $output/adapter/samples/"
echo "Photos, before and after:  $output/evaluation/sheet.png"
