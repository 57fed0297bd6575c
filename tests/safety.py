"""A safety checker of the real class, with random weights, for Stable Diffusion pipelines."""

from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests.conftest import TINY_TRANSFORMER


def add_safety_checker(pipeline: StableDiffusionPipeline, threshold: float) -> None:
    """Have the pipeline reject images whose cosine with some concept is above `threshold`: all if it is below -1."""
    vision = {"image_size": 64, "patch_size": 8, **TINY_TRANSFORMER}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=32))
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(threshold)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    pipeline.register_modules(safety_checker=checker.eval(), feature_extractor=processor)
