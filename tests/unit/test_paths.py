"""Paths: ~ in every option and argument, and none of this computer's in files that are shared."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

import train_dreambooth_kronecker
from dreambooth.errors import UserError
from dreambooth.options.base_model import split_scale
from dreambooth.options.field import declarations, shared_options
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.options.yaml_file import save_config, shared_yaml
from dreambooth.output.result import result_metadata
from dreambooth.scoring.subject import read_prompts
from interpretation.options import FileOptions
from kron_formats.files import read_text
from kron_formats.paths import last_part, shared_metadata, shared_name
from kron_formats.writing import file_metadata
from scripts import convert, demo, evaluate, generate, make_masks, merge

CONFIGS = [
    train_dreambooth_kronecker.Config,
    generate.Config,
    demo.Config,
    merge.Config,
    evaluate.Config,
    make_masks.Config,
    FileOptions,
]
NOT_PATHS = {
    "tracker_project_name",
    "hub_model_id",
    "image_column",
    "caption_column",
    "dataset_config_name",
    "revision",
    "variant",
    "hub_token",
    "kron_targets",
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    return tmp_path


def parse(*flags: str, config=train_dreambooth_kronecker.Config):
    needed = ["--pretrained_model_name_or_path=hub/model", "--instance_prompt=sks", "--instance_data_dir=photos"]
    return parse_options(config, None, [*needed, *flags])


# ---- ~ ----


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_that_names_a_file_is_declared_as_a_path(config):
    words = ("folder", "file", " path", "on the hub, or")
    looks = {
        name for name, declared in declarations(config).items() if any(word in declared.help.lower() for word in words)
    }
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config)}
    texts = {name for name in looks if kinds[name].replace("<class 'str'>", "str").startswith(("str", "list[str]"))}
    paths = {name for name, declared in declarations(config).items() if declared.path}
    assert texts - paths - NOT_PATHS - {"prompt"} == set() and paths


def test_the_home_folder_is_meant_by_a_tilde_everywhere(home):
    paths = [name for name, declared in declarations(train_dreambooth_kronecker.Config).items() if declared.path]
    paths.remove("dataset_name")  # instead of instance_data_dir
    prior = ["--with_prior_preservation", "--class_prompt=dog"]
    config = parse(*(f"--{name}=~/{name}" for name in paths), *prior)
    for name in paths:
        value = getattr(config, name)
        assert (value[0] if isinstance(value, list) else value) == f"{home}/{name}"
    (home / "x.yaml").write_text("output_dir: ~/out\nlogging_dir: ~/logs\n")
    config = parse("--config=~/x.yaml")
    assert (config.output_dir, config.logging_dir) == (f"{home}/out", f"{home}/logs")
    options = ["--pretrained_model_name_or_path=~/sd", "--prompt=sks", "--adapter", "~/a.safetensors:0.5", "b:2"]
    drawing = parse_options(generate.Config, None, options)
    assert drawing.adapter == [f"{home}/a.safetensors:0.5", "b:2"]
    assert drawing.pretrained_model_name_or_path == f"{home}/sd"
    arguments = convert.parse(
        ["~/a.safetensors", "--to", "lora", "--output", "~/b", "--pretrained_model_name_or_path=~/sd"]
    )
    assert (arguments.input, arguments.output) == (home / "a.safetensors", home / "b")
    assert arguments.pretrained_model_name_or_path == f"{home}/sd"


@pytest.mark.parametrize(
    "path, words", [("", "is empty"), (" ", "is empty"), ("~nobody-here/out", "no user nobody-here")]
)
def test_what_is_no_path_is_refused_by_its_flag(path, words, capsys):
    for flag in ("--output_dir", "--config", "--cache_dir", "--instance_data_dir"):
        with pytest.raises(SystemExit) as end:
            parse(f"{flag}={path}")
        assert end.value.code == 2 and flag in (said := capsys.readouterr().err) and words in said
    with pytest.raises(SystemExit):
        convert.parse(["a", "--to", "lora", "--output", path])
    assert words in capsys.readouterr().err


def test_a_path_may_be_no_text_and_a_prompt_may_not(capsys, tmp_path):
    config = parse("--output_dir=caf\udce9")
    assert config.output_dir == "caf\udce9"
    save_config(config, tmp_path / "config.yaml")
    assert parse(f"--config={tmp_path / 'config.yaml'}") == config
    with pytest.raises(SystemExit):
        parse("--class_prompt=caf\udce9")
    assert "--class_prompt contains" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="the paths are Unix's")
def test_folders_that_cannot_be_written_to_are_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    for good in ("", "new/folder/", "new/../other"):
        check_folder(f"{tmp_path}/{good}", "--output_dir")
    for bad in ("file", "file/inside", "file/"):
        with pytest.raises(UserError, match=f"--output_dir {tmp_path}/{bad} is .*file"):
            check_folder(f"{tmp_path}/{bad}", "--output_dir")


@pytest.mark.parametrize("name", ["class_data_dir", "cache_latents_to_disk"])
def test_a_folder_that_is_a_file_is_refused_by_its_flag(name, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        parse("--with_prior_preservation", "--class_prompt=dog", "--class_data_dir=c", f"--{name}={tmp_path / 'file'}")
    assert f"--{name} {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_drive_is_not_a_scale():
    assert split_scale(r"C:\dog.safetensors") == (r"C:\dog.safetensors", 1.0)
    assert split_scale(r"C:\dog.safetensors:0.5") == (r"C:\dog.safetensors", 0.5)


# ---- what is shared ----


@pytest.mark.parametrize(
    "path", ["/home/me/dog", "dog", "./dog/", r"C:\Users\me\dog", "C:/me/dog/", r"\\host\me\dog", "~/dog"]
)
def test_the_last_part_of_a_path_of_any_system(path):
    assert last_part(path) == "dog"


def test_a_name_on_the_hub_stays(tmp_path, monkeypatch):
    assert shared_name("me/dog") == "me/dog" and shared_name("models/sd/v1") == "v1"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "dog").mkdir(parents=True)
    assert shared_name("me/dog") == "dog"


def test_nothing_that_is_shared_says_where_files_are(tmp_path):
    place = "/home/secret/of/mine"
    paths = [name for name, declared in declarations(train_dreambooth_kronecker.Config).items() if declared.path]
    config = dataclasses.replace(parse("--class_prompt=a/dog", "--with_prior_preservation", "--class_data_dir=c"), **{
        name: f"{place}/{name}" for name in paths
    })  # fmt: skip
    for text in (json.dumps(result_metadata(3, config)), shared_yaml(config), json.dumps(shared_options(config))):
        assert "secret" not in text and "instance_data_dir" in text and "a/dog" in text
    assert result_metadata(3, config)["base_model"] == "pretrained_model_name_or_path"
    assert json.loads(result_metadata(3, parse())["config"])["pretrained_model_name_or_path"] == "hub/model"


def test_folders_in_files_of_earlier_versions_are_left_out():
    config = {
        "output_dir": "/home/secret/dog", "instance_data_dir": r"C:\Users\secret\photos", "cache_dir": "~secret/hub",
        "pretrained_model_name_or_path": "me/base", "adapter": ["/secret/a.safetensors:0.5", "b"], "seed": 3,
        "instance_prompt": "/a dog", "validation_prompt": ["~ a dog ~"], "lr": 0.1, "none": None,
    }  # fmt: skip
    shared = shared_metadata(
        {"base_model": "/home/secret/sd", "config": json.dumps(config), "instance_prompt": "/a dog"}
    )
    assert "secret" not in json.dumps(shared) and shared["base_model"] == "sd" and shared["instance_prompt"] == "/a dog"
    found = json.loads(shared["config"])
    assert found == {
        **config, "output_dir": "dog", "instance_data_dir": "photos", "cache_dir": "hub",
        "adapter": ["a.safetensors:0.5", "b"],
    }  # fmt: skip
    for damaged in ("{", '["/home/secret"]', "[" * 10_000):
        assert "config" not in shared_metadata({"config": damaged})


def test_without_metadata_a_file_says_what_tools_need_alone(tmp_path):
    assert result_metadata(3, parse("--no_metadata")) == {}
    from kron_formats.families import FAMILIES

    network = {"ss_network_module": "lycoris.kohya"}
    bare = file_metadata({"layers": "3", "targets": "[]"}, FAMILIES[0], network)
    assert set(bare) == {"ss_network_module", "ss_base_model_version", "ss_v2", "kronecker.layers", "kronecker.targets"}
    assert "modelspec.title" in file_metadata({"instance_prompt": "sks"}, FAMILIES[0], network)


# ---- files in other encodings ----


def test_text_of_other_encodings_is_read_or_named(tmp_path):
    path = tmp_path / "file"
    text = "a photo of {} im Gr\u00fcnen\r\n# a comment\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read_prompts(str(path)) == ["a photo of {} im Gr\u00fcnen"] and read_text(path, 99).count("\n") == 2
    for encoding, words in {"utf-16": "UTF-16", "cp1252": "not UTF-8"}.items():
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=f"--prompts {path}: .*{words}.*save it as UTF-8"):
            read_prompts(str(path))
