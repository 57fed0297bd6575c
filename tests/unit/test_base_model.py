"""What is taken for a base model: one file or a folder, its noise, and what is refused before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

from dreambooth.base_model.cache import text_identity, vae_identity
from dreambooth.base_model.checks import check_family, check_parts
from dreambooth.base_model.process import noise_metadata
from dreambooth.base_model.source import base_source, load_scheduler, vae_source
from dreambooth.base_model.weights import FileWeights
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.options.training import TrainingConfig
from kron_formats.architectures import load_architecture
from kron_formats.families import SD1, SD2, SDXL
from kron_formats.single_file import SingleFile, family_of_file
from kron_formats.writing import file_metadata
from tests.one_file import clip_tensors, open_clip_tensors, save_one_file, unet_tensors, vae_tensors
from toyworld.tiny_pipeline import build_pipeline

KINDS = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each family, with the weights of the folders tiny_sd and tiny_sdxl."""
    folder = tmp_path_factory.mktemp("files")
    return {f: save_one_file(build_pipeline(kind), folder / f"{f}.safetensors", f) for f, kind in KINDS.items()}


def options(name, base_config=None, **others) -> TrainingConfig:
    config = None if base_config is None else str(base_config)
    return TrainingConfig(
        pretrained_model_name_or_path=str(name), base_config=config, instance_data_dir="photos", instance_prompt="sks",
        **others,
    )  # fmt: skip


def refused(config, words):
    with pytest.raises(UserError, match=words):
        check_parts(config)
        load_scheduler(config)


# ---- one file ----


@pytest.mark.parametrize("family", KINDS)
def test_a_file_holds_the_same_weights_as_the_folder(family, files, request):
    folder = request.getfixturevalue(f"tiny_{KINDS[family]}")
    config = options(files[family], folder)
    check_parts(config)
    source, theirs = base_source(config), base_source(options(folder))
    assert source.family and source.family.name == family
    assert source.pipeline_class == theirs.pipeline_class
    for part in {"unet", "vae", "text_encoder", "text_encoder_2"} & theirs.configurations.classes.keys():
        ours, expected = (where.weights.load(part, torch.bfloat16) for where in (source, theirs))
        assert type(ours) is type(expected) and not ours.training
        expected = expected.state_dict()
        assert expected.keys() == ours.state_dict().keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items()), part


@pytest.mark.parametrize(
    "architecture, family, theirs", [("sd15", SD1, "v1"), ("sd21", SD2, "v2"), ("sdxl", SDXL, "xl_base")]
)
def test_public_models_are_known_by_their_header_and_fit_it(architecture, family, theirs):
    """Names and shapes of the real models, without content; diffusers has the same opinion."""
    models = load_architecture(architecture)
    tensors = unet_tensors(models["unet"])
    for encoder in family.text_encoders:
        if encoder.open_clip:
            tensors |= open_clip_tensors(models[encoder.component], encoder.checkpoint)
        else:
            tensors |= clip_tensors(models[encoder.component], f"{encoder.checkpoint}text_model.")
            tensors[f"{encoder.checkpoint}text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta")
    if family is SD2:  # the file has OpenCLIP's last layer and projection, which are not used
        last = {key: tensor for key, tensor in tensors.items() if "resblocks.22." in key}
        tensors |= {key.replace("resblocks.22.", "resblocks.23."): tensor for key, tensor in last.items()}
        tensors["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024, device="meta")
    assert infer_diffusers_model_type(tensors) == theirs
    file = SingleFile(Path("model"), {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
    assert family_of_file(file) is family

    class Published:
        flag = "published"
        empty = staticmethod(models.__getitem__)

    fitting = [name for name in models if name != "text_encoder_2"]  # its record lacks the projection
    FileWeights(file, Published, "file", family).check(fitting)


def test_a_file_without_a_vae_needs_one_and_takes_it_from_a_file_too(files, tiny_sd, tmp_path):
    pipeline = build_pipeline("sd", seed=1)
    without = save_one_file(pipeline, tmp_path / "no-vae.safetensors", "sd1", vae=None)
    refused(options(without, tiny_sd), "no-vae.safetensors has no VAE; .*--pretrained_vae_model_name_or_path")
    save_file({k: v.contiguous() for k, v in vae_tensors(pipeline.vae).items()}, tmp_path / "vae.safetensors")
    pipeline.vae.save_pretrained(tmp_path / "vae")
    named = [tmp_path / "vae.safetensors", tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"]
    for vae in named:
        config = options(without, tiny_sd, pretrained_vae_model_name_or_path=str(vae))
        check_parts(config)
        loaded = vae_source(config).weights.load("vae", torch.float32).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in pipeline.vae.state_dict().items())
    check_parts(options(tiny_sd, pretrained_vae_model_name_or_path=str(named[0])))
    refused(options(tiny_sd, pretrained_vae_model_name_or_path=str(files["sdxl"])[:-3]), "^--pretrained_vae_model_name")


def test_names_of_old_merges_are_read(files, tiny_sd, tmp_path):
    """Some have text_model in the names of CLIP's tensors, some do not."""
    tensors = {k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(files["sd1"]).items()}
    save_file(tensors, tmp_path / "old.safetensors")
    check_parts(options(tmp_path / "old.safetensors", tiny_sd))


def test_a_file_needs_a_configuration_of_its_own_kind(files, tiny_sd, tiny_sdxl, tmp_path):
    refused(options(files["sd1"]), "--base_config stable-diffusion-v1-5/.*default for .*sd1.safetensors.*--base_config")
    refused(options(files["sdxl"], tiny_sd), f"--base_config {tiny_sd} is a StableDiffusionPipeline.*SDXL")
    refused(options(files["sd1"], "nowhere/nothing"), "--base_config nowhere/nothing is not a base model")
    refused(options(tiny_sd, tiny_sd), "--base_config .* is for a base model in one file")
    refused(options(files["sd1"], tiny_sd, variant="fp16"), "--variant fp16 is for a model in diffusers' layout")
    with pytest.raises(
        UserError, match="sdxl.safetensors is a StableDiffusionXLPipeline, but this script trains a Sta"
    ):
        check_family(SD, options(files["sdxl"]))
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    edit(other / "unet", layers_per_block=2)
    refused(options(files["sd1"], other), "sd1.safetensors does not fit the unet of --base_config")
    edit(other / "unet", layers_per_block=1)
    edit(other / "text_encoder", intermediate_size=96)
    refused(options(files["sd1"], other), r"text_encoder .*\(128, 64\) in the file, but \(96, 64\)")


def test_a_cache_knows_a_changed_file(files, tiny_sd, tmp_path):
    path = shutil.copy(files["sd1"], tmp_path / "model.safetensors")
    config = options(path, tiny_sd)
    before = vae_identity(config), text_identity(SD, config, torch.float32)
    assert before == (vae_identity(config), text_identity(SD, config, torch.float32))
    path.touch()
    assert not {*before} & {vae_identity(config), text_identity(SD, config, torch.float32)}


# ---- files that are something else ----

SD1_TEXT = "cond_stage_model.transformer.text_model.x"
FIRST, LAST = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
OTHER_FILES = {
    "an inpainting model": ({FIRST: (4, 9, 3, 3), LAST: (4, 4, 3, 3)}, "9 .*inpainting"),
    "instruct-pix2pix": ({FIRST: (4, 8, 3, 3), LAST: (4, 4, 3, 3)}, "8 .*pix2pix"),
    "unCLIP": ({FIRST: (4, 4, 3, 3), f"{UNET}label_emb.0.0.weight": (1,), SD1_TEXT: (1,)}, "unCLIP"),
    "the refiner": ({f"{UNET}x": (1,), "conditioner.embedders.0.model.x": (1,)}, "refiner"),
    "Stable Diffusion 3": ({f"{UNET}joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
    "Flux": ({f"{UNET}double_blocks.0.x": (1,)}, "Flux"),
    "Flux without a prefix": ({"double_blocks.0.x": (1,)}, "Flux"),
    "CosXL": ({f"{UNET}x": (1,), "edm_vpred.sigma_max": (1,)}, "CosXL"),
    "Playground": ({f"{UNET}x": (1,), "edm_mean": (1,), "conditioner.embedders.1.model.x": (1,)}, "--base_config"),
    "a UNet alone": ({f"{UNET}x": (1,)}, "no text encoder"),
    "a UNet of diffusers": ({"down_blocks.0.x": (1,)}, "one component .*model_index.json"),
    "a LoRA": ({"lora_unet_x.lora_up.weight": (1,)}, "an adapter.*--adapter"),
    "a LoKr": ({"lycoris_x.lokr_w1": (1,)}, "an adapter.*--adapter"),
    "shifts": ({"down_blocks.0.x.delta": (1,)}, "an SVDiff file.*--adapter"),
    "a word": ({"<dog>": (1, 768)}, "embedding of words.*--adapter"),
    "Custom Diffusion": ({"down_blocks.0.attn2.to_k.weight": (1, 1), "<new1>": (1, 1)}, "Custom Diffusion.*--adapter"),
    "a VAE": ({"first_stage_model.encoder.conv_in.weight": (1,)}, "a VAE.*--pretrained_vae_model_name_or_path"),
    "a ControlNet": ({"control_model.input_blocks.0.0.weight": (1,)}, "a ControlNet"),
    "a text encoder": ({"text_model.x": (1,)}, "a text encoder"),
    "anything": ({"x": (1,)}, "not a base model in one file"),
    "nothing": ({}, "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_named(kind, tmp_path):
    shapes, words = OTHER_FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    refused(options(path), f"^--pretrained_model_name_or_path {path} .*{words}")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("model.ckpt", b"PK\x03\x04...", "pickle.*safetensors"),
        ("model.safetensors", b"PK\x03\x04...", "pickle.*safetensors"),
        ("model.safetensors", b"\x80\x02}q\x00X\x06...", "pickle.*safetensors"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.gguf", b"GGUF....", "GGUF"),
        ("model.safetensors", None, "there is no such file"),
        ("model.ckpt", None, "there is no such file"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(options(path), f"^--pretrained_model_name_or_path {path} .*{words}")
    if content is not None:
        refused(options("base", pretrained_vae_model_name_or_path=str(path)), f"^--pretrained_vae_.* {path} .*{words}")


def test_a_truncated_file_and_an_address_are_refused(files, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["sd1"].read_bytes()[:-100])
    refused(options(path), f"--pretrained_model_name_or_path {path} is not a readable safetensors file")
    refused(options("https://huggingface.co/x/y.safetensors"), "--pretrained_model_name_or_path https.*download")


# ---- folders ----


def test_folders_that_are_not_base_models_say_what_to_name(tiny_sd, tmp_path):
    refused(options(tiny_sd / "unet"), f"one component of a base model; name the folder around it, {tiny_sd}")
    shutil.copytree(tiny_sd / "vae", tmp_path / "vae")
    refused(options(tmp_path / "vae"), "one component, a AutoencoderKL")
    for name, files, words in (
        ("result", ["pytorch_kronecker_weights.safetensors"], "adapter.*--adapter"),
        ("models", ["dream.safetensors"], "name the file: .*models/dream.safetensors"),
        ("peft", ["adapter_config.json"], "peft.*--adapter"),
        ("empty", [], "empty"),
        ("notes", ["notes.txt"], "no model_index.json; it holds notes.txt"),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        refused(options(tmp_path / name), f"^--pretrained_model_name_or_path {tmp_path / name} .*{words}")
    shutil.copytree(tiny_sd, tmp_path / "around" / "base")
    refused(options(tmp_path / "around"), f"name the folder in it .*{tmp_path / 'around' / 'base'}")


@pytest.fixture
def base(tiny_sd, tmp_path):
    """A copy of a base model, to change."""
    return shutil.copytree(tiny_sd, tmp_path / "base")


def weight_files(base):
    return [path for part in ("unet", "vae", "text_encoder") for path in (base / part).glob("*.safetensors")]


def test_the_variant_of_weight_files_is_named(base):
    check_parts(options(base))
    refused(options(base, variant="fp16"), "--variant fp16: .*leave it out")
    for path in weight_files(base):
        path.rename(path.with_suffix(".fp16.safetensors"))
    refused(options(base), f"{base} has no weights without a variant in unet/.* --variant fp16")
    refused(options(base, variant="bf16"), f"{base} has no bf16 weights in unet/.* --variant fp16")
    config = options(base, variant="fp16")
    check_parts(config)
    assert base_source(config).weights.load("vae", torch.float32) is not None
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    refused(config, f"{base} has no weights in vae/")


def test_parts_without_the_variant_are_read_without_it(base):
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))
    config = options(base, variant="fp16")
    check_parts(config)
    assert all(base_source(config).weights.load(part, torch.float32) is not None for part in ("unet", "text_encoder"))


def test_weights_as_pickles_are_read_without_running_code(base):
    """diffusers and transformers read them with torch's unpickler for weights alone."""
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()
    torch.save(weights, path.with_suffix(".bin"))
    check_parts(options(base))
    loaded = base_source(options(base)).weights.load("unet", torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())
    torch.save({**weights, "x": print}, path.with_suffix(".bin"))
    with pytest.raises(UserError, match=f"--pretrained_model_name_or_path {base} cannot be loaded: unet"):
        base_source(options(base)).weights.load("unet", torch.float32)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("unet", {"in_channels": 9}, "its UNet takes 9 channels, but its VAE makes latents of 4"),
        ("unet", {"out_channels": 8}, "its UNet returns 8 channels, but its VAE makes latents of 4"),
        ("vae", {"latent_channels": 16}, "its UNet takes 4 channels, but its VAE makes latents of 16"),
        ("unet", {"cross_attention_dim": 128}, "text embeddings 128 wide, its text encoders make text_encoder 64"),
        ("text_encoder", {"vocab_size": 100}, r"tokenizer has \d+ tokens, its text_encoder knows 100"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(part, changes, words, base):
    edit(base / part, **changes)
    refused(options(base), f"{base}: .*{words}")


def test_another_vae_of_other_latents_is_named(base, tmp_path):
    AutoencoderKL(latent_channels=16, block_out_channels=[32]).save_pretrained(tmp_path / "vae")
    config = options(base, pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    refused(config, f"takes 4 channels, but --pretrained_vae_model_name_or_path {tmp_path / 'vae'} makes latents of 16")


def test_sdxl_s_conditions_must_fit(tiny_sdxl, tmp_path):
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    edit(base / "unet", projection_class_embeddings_input_dim=104)
    refused(options(base), "104 numbers .*text_encoder_2 makes 64 and 6 sizes make 48")


def test_a_missing_part_is_named(base):
    shutil.rmtree(base / "tokenizer")
    refused(options(base), f"{base} is not a base model: its tokenizer has no vocabulary")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "tokenizer": [None, None]}))
    refused(options(base), f"{base} is not a base model: it has no tokenizer")


# ---- the noise ----


def noise_of(path, tiny_sd, **others):
    scheduler = load_scheduler(options(path, tiny_sd, **others))
    return scheduler.config["prediction_type"], bool(scheduler.config.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize(
    "markers, metadata, expected",
    [
        ((), None, ("epsilon", False)),
        (("v_pred",), None, ("v_prediction", False)),
        (("v_pred", "ztsnr"), None, ("v_prediction", True)),
        ((), {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, ("v_prediction", True)),
        ((), {"modelspec.predict_key": "v"}, ("v_prediction", False)),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
    ],
)
def test_the_noise_of_a_file_is_found(markers, metadata, expected, tiny_sd, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"{UNET}x": torch.zeros(1), SD1_TEXT: torch.zeros(1), **{name: torch.tensor([]) for name in markers}}
    save_file(tensors, path, metadata)
    assert noise_of(path, tiny_sd) == expected


def test_options_say_what_a_configuration_has_wrong(tiny_sd, files):
    for path, folder in ((tiny_sd, None), (files["sd1"], tiny_sd)):
        assert noise_of(path, folder, prediction_type="v_prediction") == ("v_prediction", False)
        assert noise_of(path, folder, prediction_type="v_prediction", rescale_betas_zero_snr=True) == (
            "v_prediction", True,
        )  # fmt: skip
        with pytest.raises(UserError, match="--rescale_betas_zero_snr.*--prediction_type v_prediction"):
            noise_of(path, folder, rescale_betas_zero_snr=True)


def test_a_stable_diffusion_2_that_does_not_say_what_it_predicts_is_asked_for(files, tiny_sd):
    with pytest.raises(UserError, match="sd2.safetensors does not say .*--prediction_type epsilon .*v_prediction"):
        load_scheduler(options(files["sd2"]))
    assert noise_of(files["sd2"], tiny_sd) == ("epsilon", False), "its configuration was named, and says so"


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_reaches_every_kind_of_scheduler(kind, base):
    kind(beta_schedule="scaled_linear").save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind.__name__]}))
    scheduler = load_scheduler(options(base, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert scheduler.alphas_cumprod[-1] < 1e-6 and scheduler.config["timestep_spacing"] == "trailing"
    assert noise_metadata(scheduler) == {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    plain = load_scheduler(options(base))
    assert type(plain) is kind and plain.alphas_cumprod[-1] > 1e-4
    assert noise_metadata(plain) == {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"}


def test_edm_has_no_betas_to_rescale(base):
    EDMEulerScheduler().save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    assert noise_metadata(load_scheduler(options(base))) == {}
    refused(options(base, rescale_betas_zero_snr=True), "--rescale_betas_zero_snr.*EDM")


@pytest.mark.parametrize(
    "family, predicts, version, architecture",
    [
        (SD1, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (SD1, "v", "sd_v1_v", "stable-diffusion-v1/lora"),
        (SD2, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (SD2, "v", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (SDXL, "v", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_metadata_follow_the_prediction_type_as_in_sd_scripts(family, predicts, version, architecture):
    metadata = file_metadata({"title": "dog", "modelspec.prediction_type": predicts}, family, {})
    assert metadata["ss_base_model_version"] == version and metadata["modelspec.architecture"] == architecture
