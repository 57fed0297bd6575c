"""New words through the real training and the public loaders, in both methods that have them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.nn import functional as F

import dreambooth.loop.steps as steps
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline, prepare_drawing
from dreambooth.families.sd import SD
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.train import train
from kron_adapter import load_kronecker, save_kronecker
from kron_formats.errors import KroneckerError
from kron_formats.words import Word, word_metadata, word_tensors
from kron_formats.writing import prefixed, write_tensors
from methods.custom_diffusion import CUSTOM_DIFFUSION
from methods.readers import READERS
from methods.textual_inversion import TEXTUAL_INVERSION
from scripts import evaluate, generate, merge
from tests.adapters import adapted_pipeline

RATE, EPSILON, DECAY = 1e-2, 1e-3, 0.1


@pytest.fixture
def trained(tiny_sd, dog_photos, tmp_path, monkeypatch, fresh_accelerator):
    """Return a function that trains two steps: (the file's tensors, what the denoiser was given and should say)."""

    def run(method, **options):
        seen, call, losses = [], steps.Denoiser.__call__, steps.row_losses

        def called(self, *inputs):
            if torch.is_grad_enabled():
                seen.append([inputs[0].clone(), inputs[1]])
            return call(self, *inputs)

        def compared(prediction, target, *others):
            seen[-1].append(target)
            return losses(prediction, target, *others)

        monkeypatch.setattr(steps.Denoiser, "__call__", called)
        monkeypatch.setattr(steps, "row_losses", compared)
        config = config_class(method.options, TrainingConfig)(
            pretrained_model_name_or_path=str(tiny_sd),
            instance_data_dir=str(dog_photos),
            output_dir=str(tmp_path / "out"),
            resolution=64,
            max_train_steps=2,
            report_to=["none"],
            learning_rate=RATE,
            adam_epsilon=EPSILON,
            adam_weight_decay=DECAY,
            **options,
        )
        train(SD, method, config)
        return load_file(tmp_path / "out" / method.weights_name), seen

    return run


class Independent:
    """diffusers' pipeline with a word as diffusers' own examples add one: a table with a row more, and plain AdamW."""

    def __init__(self, folder, word, initial, weights=()):
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        (begins_as,) = tokenizer(initial, add_special_tokens=False).input_ids
        tokenizer.add_tokens([word])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.table, self.row = encoder.get_input_embeddings().weight, len(tokenizer) - 1
        self.table.data[self.row] = self.table.data[begins_as]
        self.weights = {name: p for name, p in self.pipeline.unet.named_parameters() if name.endswith(weights)}
        self.trained = [self.table, *self.weights.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, eps=EPSILON, weight_decay=DECAY)

    def predict(self, noisy, timesteps, prompt):
        tokens = self.pipeline.tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt")
        return self.pipeline.unet(noisy, timesteps, self.pipeline.text_encoder(tokens.input_ids)[0]).sample

    def step(self, loss):
        loss.backward()
        self.table.grad[: self.row] = 0
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        others = self.table[: self.row].detach().clone()
        self.optimizer.step()
        self.table.data[: self.row] = others  # which weight decay has moved
        self.pipeline.unet.zero_grad()
        self.pipeline.text_encoder.zero_grad()


def test_textual_inversion_takes_the_steps_of_plain_autograd(trained, tiny_sd):
    prompt = "a photo of a <dog>"
    tensors, seen = trained(TEXTUAL_INVERSION, instance_prompt=prompt, placeholder_token="<dog>", initializer_token="d")
    other = Independent(tiny_sd, "<dog>", "d", weights=("nothing",))
    before = other.table[other.row].detach().clone()
    for noisy, timesteps, noise in seen:
        other.step(F.mse_loss(other.predict(noisy, timesteps, prompt), noise))
    assert tensors.keys() == {"<dog>"} and tensors["<dog>"].shape == (1, len(before))
    torch.testing.assert_close(tensors["<dog>"][0], other.table[other.row].detach(), atol=1e-6, rtol=1e-5)
    assert (tensors["<dog>"][0] - before).abs().mean() > RATE / 10


@pytest.mark.parametrize("word", ["<new1>", None])
def test_custom_diffusion_takes_the_steps_of_plain_autograd(word, trained, tiny_sd):
    """With the base model's prior, which begins to pull at the second step."""
    prompt, class_prompt = f"photo of a {word or 'k'} dog", "photo of a dog"
    tensors, seen = trained(
        CUSTOM_DIFFUSION,
        instance_prompt=prompt,
        class_prompt=class_prompt,
        with_prior_preservation=True,
        prior_source="base_model",
        prior_loss_weight=0.5,
        **({"modifier_token": word, "initializer_token": "d"} if word else {}),
    )
    other = Independent(tiny_sd, "<new1>", "d", weights=("attn2.to_k.weight", "attn2.to_v.weight"))
    base = Independent(tiny_sd, "<new1>", "d")
    if word is None:
        other.optimizer = torch.optim.AdamW(other.weights.values(), lr=RATE, eps=EPSILON, weight_decay=DECAY)
        other.trained = [*other.weights.values()]
    priors = []
    for noisy, timesteps, target in seen:
        with torch.no_grad():
            prior = base.predict(noisy[1:], timesteps[1:], class_prompt)
        torch.testing.assert_close(target[1:], prior, atol=1e-5, rtol=1e-4)
        priors.append(F.mse_loss(other.predict(noisy[1:], timesteps[1:], class_prompt), prior))
        other.step(F.mse_loss(other.predict(noisy[:1], timesteps[:1], prompt), target[:1]) + 0.5 * priors[-1])
    assert priors[0] < 1e-9 < priors[1]
    expected = {name: weight.detach() for name, weight in other.weights.items()}
    if word:
        expected[word] = other.table[other.row].detach()[None]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-6, rtol=1e-5)


# ---- files ----

WIDTH = 64  # of the tiny text encoders


def write_word(path, text="<dog>", count=2, encoders=("text_encoder",), width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    word = Word(text, {encoder: torch.randn(count, width, generator=generator) for encoder in encoders})
    write_tensors(path, word_tensors(word), prefixed(word_metadata(word)))
    return word


@pytest.fixture
def word(tmp_path):
    write_word(tmp_path / "dog.safetensors")
    return tmp_path / "dog.safetensors"


def draw(pipeline, prompt):
    pipeline.set_progress_bar_config(disable=True)
    (image,) = draw_images(pipeline, [0], 1, prompt=prompt, num_inference_steps=2, height=64, width=64)
    return torch.from_numpy(np.array(image)).float()


def adapted(base, *files):
    given = AdaptedModelOptions(pretrained_model_name_or_path=str(base), adapter=[str(file) for file in files])
    return load_adapted_pipeline(given, READERS)


def test_diffusers_own_loader_reads_every_vector_bit_for_bit(word, tiny_sd):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_textual_inversion(word.parent, weight_name=word.name)
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<dog>", "<dog>_1"])
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, load_file(word)["<dog>"])
    ours, prompt = adapted(tiny_sd, word), "a photo of a <dog>"
    assert torch.equal(draw(ours, prompt), draw(pipeline, prompt))


def test_a_word_draws_beside_a_kronecker_adapter_and_merging_keeps_it(word, tiny_sd, tmp_path):
    save_kronecker(adapted_pipeline("sd", 4, 64, strength=0.3), tmp_path / "kronecker.safetensors")
    together, prompt = adapted(tiny_sd, word, tmp_path / "kronecker.safetensors"), "a photo of a <dog>"
    other = DiffusionPipeline.from_pretrained(tiny_sd)
    other.load_textual_inversion(word.parent, weight_name=word.name)
    alone = draw(other, prompt)
    load_kronecker(other, tmp_path / "kronecker.safetensors")
    drawn = draw(other, prompt)
    assert torch.equal(draw(together, prompt), drawn) and not torch.equal(drawn, alone)
    config = AdaptedModelOptions(pretrained_model_name_or_path=str(tiny_sd))
    prepare_drawing(together, READERS, config)  # merges, with another solver
    together.scheduler = other.scheduler
    assert (draw(together, prompt) - drawn).abs().max() <= 1  # of 255


def test_a_merged_pipeline_knows_the_word_without_this_project(word, tiny_sd, run_main, tmp_path):
    run_main(merge, pretrained_model_name_or_path=tiny_sd, adapter=[str(word)], output_dir=tmp_path / "merged")
    merged, prompt = DiffusionPipeline.from_pretrained(tmp_path / "merged"), "a photo of a <dog>"
    assert torch.equal(draw(merged, prompt), draw(adapted(tiny_sd, word), prompt))


@pytest.mark.parametrize("script", [generate, evaluate, merge], ids=lambda script: script.__name__)
def test_words_that_cannot_be_used_are_refused_before_weights_are_read(
    script, word, tiny_sd, tiny_sdxl, dog_photos, run_main, tmp_path, monkeypatch
):
    monkeypatch.setattr("dreambooth.drawing.pipelines.load_base_pipeline", None)
    write_word(tmp_path / "wide.safetensors", width=2 * WIDTH)
    write_word(tmp_path / "known.safetensors", "a")
    write_word(tmp_path / "overlaps.safetensors", "<dog>gy")
    cases = [
        (tiny_sd, [f"{word}:0.5"], {}, "0.5"),
        (tiny_sd, [str(word)], {"adapter_scale": 0}, "strength is 0"),
        (tiny_sd, [str(tmp_path / "wide.safetensors")], {}, "128"),
        (tiny_sd, [str(tmp_path / "known.safetensors")], {}, "already, as a</w>"),
        (tiny_sd, [str(word), str(tmp_path / "overlaps.safetensors")], {}, "overlaps"),
        (tiny_sd, [str(word), str(word)], {}, "already"),
        (tiny_sdxl, [str(word)], {}, "text_encoder_2"),
    ]
    own = {
        generate: {"prompt": ["a <dog>"]},
        evaluate: {"prompt": ["a {}"], "class_noun": "dog", "instance_data_dir": dog_photos},
        merge: {},
    }
    for base, files, options, said in cases:
        with pytest.raises(KroneckerError) as error:
            run_main(
                script,
                pretrained_model_name_or_path=base,
                adapter=files,
                output_dir=tmp_path / "out",
                **options,
                **own[script],
            )
        assert said in str(error.value)


def test_generate_counts_all_tokens_of_a_word_and_warns_of_prompts_without_it(
    word, tiny_sd, run_main, tmp_path, caplog
):
    options = {"num_images": 1, "num_inference_steps": 1, "height": 64, "width": 64, "output_dir": tmp_path / "out"}
    prompts = ["<dog> " * 40, "a dog", "a <DOG>s"]
    run_main(generate, pretrained_model_name_or_path=tiny_sd, adapter=[str(word)], prompt=prompts, **options)
    assert "--prompt, number 1: 80 tokens" in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if "without <dog>" in record.getMessage()]
    assert line.endswith(": a dog")


@pytest.mark.parametrize(
    "given, subject, base",
    [({}, "<dog>", "dog"), ({"instance_token": "my <dog>"}, "my <dog> dog", "dog")],
)
def test_evaluate_names_the_subject_by_its_word(
    given, subject, base, word, quick_evaluation, dog_photos, run_main, tmp_path
):
    run_main(
        evaluate,
        adapter=[str(word)],
        prompt=["a {} in the snow"],
        class_noun="dog",
        instance_data_dir=dog_photos,
        output_dir=tmp_path / "out",
        **quick_evaluation,
        **given,
    )
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    (row,), (base_row,) = (report["models"][model]["by_prompt"] for model in ("adapted", "base"))
    assert row["prompt"] == f"a {subject} in the snow" and base_row["prompt"] == f"a {base} in the snow"
    assert report["prior"]["distance"] == pytest.approx(0, abs=1e-6)  # other prompts keep their images


def test_custom_diffusion_s_strength_scales_its_weights(tiny_sd, tmp_path):
    pipeline, path = DiffusionPipeline.from_pretrained(tiny_sd), tmp_path / "custom.safetensors"
    weights = {n: p.detach() for n, p in pipeline.unet.named_parameters() if n.endswith("attn2.to_k.weight")}
    word = Word("<new1>", {"text_encoder": torch.ones(1, WIDTH)})
    write_tensors(path, {**{name: weight + 1 for name, weight in weights.items()}, **word_tensors(word)}, {})
    half = adapted(tiny_sd, f"{path}:0.5")
    for name, weight in weights.items():
        torch.testing.assert_close(half.unet.get_parameter(name), weight + 0.5)
    number = half.tokenizer.convert_tokens_to_ids("<new1>")
    assert torch.equal(half.text_encoder.get_input_embeddings().weight[number], torch.ones(WIDTH))
