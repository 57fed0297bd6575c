"""What a training run writes into its adapter file, read as other tools read it."""

import base64
import io

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_dreambooth_kronecker as sd

WEIGHTS = "pytorch_kronecker_weights.safetensors"


def test_a_run_saves_in_the_precision_asked_for_with_trigger_words_and_a_thumbnail(
    tiny_sd, dog_photos, tmp_path, run_main
):
    run_main(
        sd, pretrained_model_name_or_path=tiny_sd, instance_data_dir=dog_photos, instance_prompt="a photo of sks dog",
        output_dir=tmp_path / "out", resolution=64, max_train_steps=2, report_to="none", save_precision="fp16",
        validation_prompt=["sks dog"], num_validation_images=1, validation_num_inference_steps=1,
    )  # fmt: skip
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert len(tensors) == 3 * 32 and {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "a photo of sks dog" and metadata["modelspec.resolution"] == "64x64"
    head, _, data = metadata["modelspec.thumbnail"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG" and max(image.size) <= 256
