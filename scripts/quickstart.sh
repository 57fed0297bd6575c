#!/usr/bin/env bash
# Train an adapter on bundled pictures of a subject, on the CPU, and draw the subject with it:    scripts/quickstart.sh
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt

export TRANSFORMERS_VERBOSITY=error  # no notices of optional packages
output=outputs/quickstart
python -m toyworld.tiny_pipeline sd "$output/base"
accelerate launch --config_file configs/accelerate/cpu.yaml train_dreambooth_kronecker.py \
    --config configs/quickstart.yaml --overwrite_output_dir
python scripts/generate.py --pretrained_model_name_or_path "$output/base" \
    --adapter "$output/adapter/pytorch_kronecker_weights.safetensors" \
    --prompt "a photo of sks robot" "a photo of sks robot on the beach" \
    --num_images 4 --height 64 --width 64 --output_dir "$output/images"

echo
echo "The adapter:       $output/adapter/pytorch_kronecker_weights.safetensors"
echo "While it trained:  $output/adapter/samples/"
echo "Drawn with it:     $output/images/grid.png"
