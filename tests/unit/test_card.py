"""The model card: what it says, that no prompt can break it, and its upload, with a Hub that is not there."""

import ast
import dataclasses
import logging
import re
import shlex
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open

from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Host, adapter_groups
from dreambooth.options.yaml_file import save_config
from dreambooth.report import card
from dreambooth.report.card import push_to_hub, save_card
from kron_adapter import kronecker_parameters, load_kronecker
from train_dreambooth_kronecker import Config

SECRET = "hf_nobodyMayReadThis"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NASTY = [
    'a `snow` | **dog** <script>alert("x")</script>',
    "---\nlicense: mit\n---\n# not a heading",
    "```\nrm -rf /\n```",
    "- {a: [1, 'b'] #: &x *y !z %",
    "``",
    "back\\slash 'and' \"quotes\" ",
    "ein Hündchen 🐶 小狗",
    "null",
]


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        pretrained_model_name_or_path=BASE,
        instance_data_dir="photos",
        instance_prompt="a photo of sks dog",
        validation_prompt=["sks dog in snow", "a watercolor of sks dog"],
        output_dir=str(tmp_path),
        max_train_steps=800,
        hub_token=SECRET,
        hub_model_id="someone/dog",
        push_to_hub=True,
    )


@pytest.fixture
def adapter(tmp_path, tiny_sd, config):
    """An adapter file for UNet and text encoder, how many parameters and layers it has, and the adapter itself."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    sizes = {"kron_a1": 4, "kron_a2": 32, "kron_factors": ["to_k=8,8", "attn2.to_k=1,d_in"]}
    text_sizes = {"train_text_encoder": True, "text_encoder_kron_a1": 2, "text_encoder_kron_a2": 16}
    models = SD.trained_models(pipeline.components, with_text=True)
    attached = KRONECKER.attach(Host(SD, models, {}), dataclasses.replace(config, **sizes, **text_sizes))
    path = tmp_path / "pytorch_kronecker_weights.safetensors"
    attached.save(path, {}, torch.float32)
    factors = [parameter.numel() for model in models.values() for parameter in kronecker_parameters(model)]
    return path, sum(factors), len(factors) // 2, attached


@pytest.fixture
def results(tmp_path, config):
    """What lies in the output folder at the end of a run."""
    for name in (
        "samples/step-000000.png", "samples/step-000800.png", "training.png", "metrics.jsonl", "logs/events.out",
        "checkpoint-500/pytorch_kronecker_weights.safetensors", "checkpoint-500/training_state.safetensors",
        "checkpoint-500/README.md", "checkpoint-500/config.yaml", "photos/dog.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    save_config(config, tmp_path / "config.yaml")


def written(config, adapter, family=SD) -> tuple[dict, str]:
    """Write the card; return its front matter and its text, as the Hub's own reader sees them."""
    path, _, _, attached = adapter
    trained = family.trained_models(attached.host.models, KRONECKER.trains_text(config))
    groups = adapter_groups(family, {name: kronecker_parameters(model) for name, model in trained.items()}, config)
    save_card(path, dataclasses.replace(attached, groups=groups), family, 800, config)
    loaded = ModelCard.load(f"{config.output_dir}/README.md")
    return loaded.data.to_dict(), loaded.text


# ---- what it says ----


def test_the_card_says_what_the_adapter_is(config, adapter, results):
    front, text = written(config, adapter)
    assert front["base_model"] == BASE and front["library_name"] == "diffusers"
    assert {"dreambooth", "kronecker", "lokr", "stable-diffusion", "diffusers"} <= set(front["tags"])
    assert front["instance_prompt"] == "a photo of sks dog"
    assert [entry["text"] for entry in front["widget"]] == config.validation_prompt
    assert {entry["output"]["url"] for entry in front["widget"]} == {"samples/step-000800.png"}
    for words in (
        "(samples/step-000800.png)", "(training.png)", "1. `sks dog in snow`\n2. `a watercolor of sks dog`",
        f"{adapter[2]} layers, {adapter[1]:,} parameters", "- steps: 800",
        "- batch: 1 per device, 1 accumulated", "- learning rate: 0.0005, constant", "- optimizer: AdamW",
        "- resolution: 512 px", "- prior preservation: none", "ComfyUI, AUTOMATIC1111 and Forge", "LoKr",
    ):  # fmt: skip
        assert words in text, words


def test_factors_are_those_of_the_file(config, adapter):
    rows = [line for line in written(config, adapter)[1].splitlines() if line.startswith("|")]
    assert "| UNet | `to_q` | 64 → 64 | (4, 32) | (16, 2) | 6 |" in rows
    assert "| UNet | `to_k` | 64 → 64 | (8, 8) | (8, 8) | 3 |" in rows
    assert "| UNet | `attn2.to_k` | 64 → 128 | (1, 64) | (128, 1) | 1 |" in rows
    assert "| text encoder | `q_proj` | 64 → 64 | (2, 16) | (32, 4) | 2 |" in rows
    assert sum(int(row.split("|")[-2]) for row in rows[2:]) == adapter[2]
    with safe_open(adapter[0], framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    pairs = [(key, key.replace("lokr_w1", "lokr_w2")) for key in shapes if key.endswith("lokr_w1")]
    told: Counter = Counter()
    for *_, first, second, count in (row.strip("|").split("|") for row in rows[2:]):
        told[ast.literal_eval(first.strip()), ast.literal_eval(second.strip())] += int(count)
    assert told == Counter((shapes[first], shapes[second]) for first, second in pairs)


def test_the_families_differ_in_their_tag(config, adapter):
    assert "stable-diffusion-xl" in written(config, adapter, SDXL)[0]["tags"]
    assert "stable-diffusion-xl" not in written(config, adapter)[0]["tags"]


@pytest.mark.parametrize("base", ["./models/mine", "/data/models/mine", r"C:\me\mine", "mine", "a folder/mine/"])
def test_a_base_model_that_is_not_on_the_hub_is_not_named_to_it_nor_where_it_is(base, config, adapter):
    config = dataclasses.replace(config, pretrained_model_name_or_path=base, pretrained_vae_model_name_or_path=base)
    front, text = written(config, adapter)
    assert "base_model" not in front and "license_link" not in front
    assert "for `mine`:" in text and "VAE: `mine`" in text and "from_pretrained('mine'" in text.replace('"', "'")
    assert base == "mine" or base not in text


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(config, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    config = dataclasses.replace(config, pretrained_model_name_or_path="outputs/base")
    assert "base_model" not in written(config, adapter)[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_text_encoder": True}, "- learning rate of the text encoders: 0.0005"),
        ({"train_text_encoder": True, "text_encoder_lr": 1e-5}, "- learning rate of the text encoders: 1e-05"),
        ({"use_8bit_adam": True}, "- optimizer: AdamW with 8-bit state"),
        ({"optimizer": "Prodigy"}, "- optimizer: Prodigy"),
        ({"snr_gamma": 5.0}, "- min-SNR gamma: 5"),
        ({"pretrained_vae_model_name_or_path": "some/vae"}, "- VAE: `some/vae`"),
        (
            {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 7, "prior_loss_weight": 0.5},
            "- prior preservation: 7 class images for `a dog`, weight 0.5",
        ),
        (
            {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": "base_model"},
            "- prior preservation: the base model's own prediction for `a dog`, weight 1",
        ),
    ],
)
def test_settings_that_were_chosen_are_told(change, words, config, adapter):
    assert f"\n{words}" in written(dataclasses.replace(config, **change), adapter)[1]


def test_without_samples_and_curves_nothing_points_at_them(config, adapter):
    front, text = written(dataclasses.replace(config, validation_prompt=[]), adapter)
    assert "widget" not in front and "](samples" not in text and "](training.png)" not in text
    assert 'pipeline("a photo of sks dog")' in text


def test_the_snippet_runs(config, adapter, tiny_sd, tmp_path, monkeypatch):
    """Word for word, but for the GPU and its precision, on the small pipeline."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / tiny_sd.name).symlink_to(tiny_sd)  # which the card calls by its name alone
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tiny_sd))
    snippet = re.search("```python\n(.*?)```", written(config, adapter)[1], re.DOTALL)[1]
    names: dict = {}
    for old, new in {"cuda": "cpu", "float16": "float32", ").images": ", num_inference_steps=1).images"}.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(snippet, names)
    assert names["image"].size[0] > 0 and names["load_kronecker"] is load_kronecker


# ---- what it cannot be made to say ----


def inline_code(text: str) -> list[str]:
    """The code spans of Markdown, by CommonMark's rule: closed by as many backticks as opened them."""
    spans = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", text)
    return [span[1:-1] if span[0] == span[-1] == " " and span.strip() else span for _, span in spans]


@pytest.mark.parametrize("prompt", NASTY)
def test_no_prompt_breaks_the_card(prompt, config, adapter, results):
    config = dataclasses.replace(
        config, instance_prompt=prompt, validation_prompt=[prompt, "sks dog"], class_prompt=prompt,
        with_prior_preservation=True,
    )  # fmt: skip
    front, text = written(config, adapter)
    assert front["instance_prompt"] == prompt
    assert [entry["text"] for entry in front["widget"]] == [prompt, "sks dog"]
    assert front["license"] == "other" and front["base_model"] == BASE

    line = " ".join(prompt.split())
    heading, numbered = (next(row for row in text.splitlines() if row.startswith(sign)) for sign in ("# ", "1. "))
    assert inline_code(heading) == [line] and inline_code(numbered) == [line]
    assert [row for row in text.splitlines() if row.startswith("#")][1:] == [
        "## Samples", "## Use", "## The Kronecker adapter", "## Training",
    ]  # fmt: skip
    (snippet,) = re.findall("^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert prompt in [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]


def test_the_card_does_not_hold_the_token(config, adapter, results, tmp_path):
    written(config, adapter)
    assert SECRET not in (tmp_path / "README.md").read_text() + (tmp_path / "config.yaml").read_text()


def test_a_card_that_cannot_be_written_is_a_warning(config, adapter, tmp_path, caplog):
    path, _, _, attached = adapter
    path.unlink()  # a result that cannot be described
    save_card(path, attached, SD, 800, config)
    path.touch()
    (tmp_path / "README.md").mkdir()
    save_card(path, attached, SD, 800, config)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.text.count("README.md was not written") == 2


# ---- to the Hub ----


@pytest.fixture
def hub(monkeypatch):
    """A Hub that remembers what it is asked; `hub.fails` makes it fail as the network does."""
    hub = SimpleNamespace(calls=[], fails=None)

    class Api:
        def __init__(self, token=None):
            hub.calls.append(("login", token))

        def create_repo(self, name, exist_ok):
            hub.calls.append(("create_repo", name, exist_ok))
            if hub.fails:
                raise hub.fails
            return SimpleNamespace(repo_id=name if "/" in name else f"someone/{name}")

        def upload_folder(self, **options):
            hub.calls.append(("upload_folder", options))

        def upload_file(self, **options):
            hub.calls.append(("upload_file", options))

    monkeypatch.setattr(card, "HfApi", Api)
    return hub


def test_nothing_is_uploaded_unless_asked(config, adapter, hub):
    push_to_hub(adapter[0], dataclasses.replace(config, push_to_hub=False))
    assert hub.calls == []


def test_the_adapter_and_its_card_are_uploaded_and_nothing_else(config, adapter, results, hub, tmp_path, caplog):
    written(config, adapter)
    with caplog.at_level(logging.INFO):
        push_to_hub(adapter[0], config)
    (_, token), (_, name, exist_ok), (_, options), (_, written_options) = hub.calls
    assert (token, name, exist_ok) == (SECRET, "someone/dog", True)
    assert options["repo_id"] == "someone/dog" and options["folder_path"] == str(tmp_path)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(files, allow_patterns=options["allow_patterns"])) == [
        "README.md", "pytorch_kronecker_weights.safetensors", "samples/step-000000.png",
        "samples/step-000800.png", "training.png",
    ]  # fmt: skip
    assert written_options["repo_id"] == "someone/dog" and written_options["path_in_repo"] == "config.yaml"
    shared = yaml.safe_load(written_options["path_or_fileobj"])
    local = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert local["output_dir"] == str(tmp_path) and shared == {**local, "output_dir": tmp_path.name}
    assert "https://huggingface.co/someone/dog" in caplog.text


def test_a_result_that_is_a_folder_is_uploaded_with_its_copy_in_one_file(config, hub, tmp_path):
    names = ["README.md", "pipeline.safetensors", "pipeline/model_index.json", "pipeline/unet/config.json"]
    others = ["checkpoint-5/unet/config.json", "checkpoint-5/training_state.safetensors", "logs/x", ".lock"]
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    push_to_hub(tmp_path / "pipeline", config)
    assert sorted(filter_repo_objects([*names, *others], allow_patterns=hub.calls[2][1]["allow_patterns"])) == names


@pytest.mark.parametrize("folder, name", [("dog", "dog"), ("my dog (2)", "my-dog-2-")])
def test_the_repository_is_named_after_the_folder(folder, name, config, adapter, hub, tmp_path, caplog):
    config = dataclasses.replace(config, hub_model_id=None, output_dir=str(tmp_path / folder))
    with caplog.at_level(logging.INFO):
        push_to_hub(adapter[0], config)
    assert hub.calls[1][1] == name and f"huggingface.co/someone/{name}" in caplog.text


@pytest.mark.parametrize(
    "error", [ConnectionError(f"no network for {SECRET}"), ValueError("bad name"), OSError("disk"), HfHubHTTPError]
)
def test_a_failed_upload_is_a_warning_with_the_command_for_later(error, config, adapter, hub, caplog):
    if error is HfHubHTTPError:
        error = HfHubHTTPError("401", response=SimpleNamespace(headers={}, request=None, status_code=401))
    hub.fails = error
    config = dataclasses.replace(config, output_dir="out put/dog's")
    push_to_hub(adapter[0], config)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and type(error).__name__ in caplog.text and SECRET not in caplog.text
    words = shlex.split(caplog.text.rpartition("&& ")[2])
    assert words[:5] == ["hf", "upload", "someone/dog", "out put/dog's", "."]
    assert words[5::2] == ["--include"] * 4 and words[6] == adapter[0].name


def test_the_command_for_later_is_one_that_the_hub_s_client_knows(config, adapter, hub, caplog):
    """Without the network it gets as far as the network."""
    hub.fails = ConnectionError("no network")
    push_to_hub(adapter[0], config)
    words = shlex.split(caplog.text.rpartition("&& hf ")[2])
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words, "--token", "hf_none"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "offline mode is enabled" in result.stdout + result.stderr
