"""New words through the real training and the public loaders, in both methods that have them."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.nn import functional as F

import dreambooth.loop.steps as steps
from dreambooth.families.sd import SD
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.train import train
from methods.custom_diffusion import CUSTOM_DIFFUSION
from methods.textual_inversion import TEXTUAL_INVERSION

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
        config = config_class(TrainingConfig, method.options)(
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
