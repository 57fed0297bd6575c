"""Options: from YAML and the command line to a config, what is refused and in which words, and back to YAML."""

import ast
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.errors import SaveError, UserError, readable_errors
from dreambooth.options.checking import check_options, check_values
from dreambooth.options.field import declarations, groups_of, option, public_options, result_options
from dreambooth.options.foreign import TABLE, answers_of, explain_unknown, flags_in
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.options.yaml_file import save_config
from interpretation.options import FileOptions, InterpretationOptions
from kron_formats.errors import KroneckerError
from methods.options import LoraOptions
from scripts import evaluate, generate, merge
from tests.conftest import ROOT
from train_dreambooth_kronecker import Config

REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
DEFAULTS = Config(**REQUIRED)
FIELDS = dataclasses.fields(Config)
ANSWERS = answers_of(Config)
LORA = config_class(LoraOptions, TrainingConfig)
SCRIPTS = {"sd": Config, "sdxl": sdxl.Config, "generate": generate.Config, "evaluate": evaluate.Config}
SCRIPTS |= {"merge": merge.Config, "interpret": InterpretationOptions, "interpret-files": FileOptions}


def parse(*flags, required=REQUIRED):
    return parse_options(Config, "What the script does.", [*flags, *(f"--{k}={v}" for k, v in required.items())])


def refusal(capsys, *flags, required=REQUIRED):
    """What is said about flags that are refused: a message, and one line that says where more is to be found."""
    with pytest.raises(SystemExit) as exit:
        parse(*flags, required=required)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    message, hint, end = err.rsplit("\n", 2)
    assert not out and not end and "--help" in hint
    return message.removeprefix("error: ")


@pytest.fixture
def write_yaml(tmp_path):
    """Write a YAML file and return the flags that name it."""

    def write(text):
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


# ---- what is accepted ----


def test_required_options_are_enough_and_the_rest_is_default():
    assert parse() == DEFAULTS


def test_the_command_line_is_the_program_s_own_where_none_is_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "3", *(f"--{k}={v}" for k, v in REQUIRED.items())])
    assert parse_options(Config, "") == dataclasses.replace(DEFAULTS, seed=3)


@pytest.mark.parametrize(
    "text, option, value",
    [
        ("learning_rate: 5e-4", "learning_rate", 5e-4),
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("prior_loss_weight: 1", "prior_loss_weight", 1.0),
        ("max_train_steps: 100", "max_train_steps", 100),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: bf16", "mixed_precision", "bf16"),
        ("center_crop: true", "center_crop", True),
        ("center_crop: Yes", "center_crop", True),
        ("center_crop: no", "center_crop", False),
        ("center_crop: null", "center_crop", False),
        ("mixed_precision: null", "mixed_precision", None),
        ("max_train_steps: ~", "max_train_steps", None),
        ("max_train_steps: NULL", "max_train_steps", None),
        ("max_train_steps:", "max_train_steps", None),
        ("validation_prompt:", "validation_prompt", []),
        ("validation_prompt: []", "validation_prompt", []),
        ("validation_prompt: one, alone", "validation_prompt", ["one, alone"]),
        ('validation_prompt: [a, "b, c", no]', "validation_prompt", ["a", "b, c", "no"]),
        ("validation_prompt:\n- a dog # not this\n- 'sks: #1'", "validation_prompt", ["a dog", "sks: #1"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("kron_factors: {to_k: [8, 64], to_out.0: [4, 32]}", "kron_factors", ["to_k=8,64", "to_out.0=4,32"]),
        ("kron_factors:\n  to_k: 8,64", "kron_factors", ["to_k=8,64"]),
        ("kron_factors: {attn2.to_k: [1, d_in]}", "kron_factors", ["attn2.to_k=1,d_in"]),
        ("kron_a1: 8", "kron_a1", 8),
        ("kron_a1: d_out/8", "kron_a1", "d_out/8"),
        ("kron_a2: d_in", "kron_a2", "d_in"),
        ("kron_factors: ['to_k=8,64']", "kron_factors", ["to_k=8,64"]),
        ("instance_prompt: 5e-4", "instance_prompt", "5e-4"),
        ("instance_prompt: 'null'", "instance_prompt", "null"),
        ("instance_prompt: --seed=3", "instance_prompt", "--seed=3"),
        ("instance_prompt: ein Hündchen 🐶", "instance_prompt", "ein Hündchen 🐶"),
        ("prior_negative_prompt: ''", "prior_negative_prompt", ""),
    ],
)  # fmt: skip
def test_yaml_values_mean_what_they_say(write_yaml, text, option, value):
    required = {name: value for name, value in REQUIRED.items() if name != option}
    config = parse(*write_yaml(text), required=required)
    assert config == dataclasses.replace(DEFAULTS, **{option: value})
    assert type(getattr(config, option)) is type(value)


@pytest.mark.parametrize("first", ["file", "command line"])
@pytest.mark.parametrize(
    "text, flags, option, value",
    [
        ("resolution: 64", ["--resolution", "128"], "resolution", 128),
        ("resolution: 64", ["--resolution=128"], "resolution", 128),
        ("resolution: 64", ["--seed", "0"], "resolution", 64),
        ("center_crop: true", ["--center_crop", "false"], "center_crop", False),
        ("center_crop: false", ["--center_crop"], "center_crop", True),
        ("report_to: [tensorboard, wandb]", ["--report_to", "none"], "report_to", ["none"]),
        ("validation_prompt: [a, b]", ["--validation_prompt", "c", "d"], "validation_prompt", ["c", "d"]),
        ("kron_factors: {to_k: [8, 64]}", ["--kron_factors", "to_v=4,4"], "kron_factors", ["to_v=4,4"]),
    ],
)
def test_the_command_line_wins_over_the_file_wherever_it_is_named(write_yaml, first, text, flags, option, value):
    file = write_yaml(text)
    config = parse(*file, *flags) if first == "file" else parse(*flags, *file)
    assert config == dataclasses.replace(DEFAULTS, **{option: value})


def test_required_options_may_come_from_the_file(write_yaml):
    assert parse(*write_yaml("\n".join(f"{k}: {v}" for k, v in REQUIRED.items())), required={}) == DEFAULTS


def test_a_command_line_of_diffusers_example_pastes_in():
    command_line = """
        --pretrained_model_name_or_path X --instance_data_dir Y --output_dir Z --instance_prompt "a photo of sks dog"
        --resolution 512 --train_batch_size 1 --gradient_accumulation_steps 1 --checkpointing_steps 100
        --learning_rate 1e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500
        --validation_prompt "A photo of sks dog in a bucket" --validation_epochs 50 --seed 0
    """
    assert parse(*shlex.split(command_line), required={}) == Config(
        pretrained_model_name_or_path="X",
        instance_data_dir="Y",
        output_dir="Z",
        instance_prompt="a photo of sks dog",
        resolution=512,
        train_batch_size=1,
        gradient_accumulation_steps=1,
        checkpointing_steps=100,
        learning_rate=1e-4,
        report_to=["wandb"],
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_train_steps=500,
        validation_prompt=["A photo of sks dog in a bucket"],
        validation_epochs=50,
        seed=0,
    )


def test_kron_factors_are_read_by_target():
    config = parse("--kron_factors", "to_k=8,64", "attn2.to_out.0= 4, 32", "attn2.to_v=d_out/8,d_in")
    assert config.factors_by_target() == {
        "to_k": (8, 64),
        "attn2.to_out.0": (4, 32),
        "attn2.to_v": ("d_out/8", "d_in"),
    }
    assert DEFAULTS.factors_by_target() == {}


@pytest.mark.parametrize(
    "flags, shape, text_shape",
    [
        ("", (4, 64), (4, 64)),
        ("--kron_a1 8", (8, 64), (8, 64)),
        ("--kron_a2 d_in", (4, "d_in"), (4, "d_in")),
        ("--kron_b1 8", ("d_out/8", 64), ("d_out/8", 64)),
        ("--kron_b1 8 --kron_a2 16", ("d_out/8", 16), ("d_out/8", 16)),
        ("--kron_b1 8 --kron_b2 1", ("d_out/8", "d_in/1"), ("d_out/8", "d_in/1")),
        ("--kron_b1 8 --train_text_encoder --text_encoder_kron_a1 2", ("d_out/8", 64), (2, 64)),
        ("--train_text_encoder --text_encoder_kron_a2 d_in/4", (4, 64), (4, "d_in/4")),
    ],
)
def test_a_side_without_a_size_of_a_or_b_has_the_default(flags, shape, text_shape):
    config = parse(*flags.split())
    assert (config.shape(), config.text_encoder_shape()) == (shape, text_shape)
    given = {name: int(value) for name, value in re.findall(r"--(kron_b\d) (\d+)", flags)}
    assert {name: getattr(config, name) for name in ("kron_b1", "kron_b2")} == {
        "kron_b1": None,
        "kron_b2": None,
    } | given
    assert (config.kron_a1 is None, config.kron_a2 is None) == ("kron_b1" in given, "kron_b2" in given)


def test_a_size_in_numbers_is_the_same_option_however_it_is_written():
    assert Config(**REQUIRED, kron_a1="4", text_encoder_kron_a2=" 8") == Config(**REQUIRED, text_encoder_kron_a2=8)


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().seed = 1


def test_parsing_touches_nothing(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "options.yaml").write_text("output_dir: out\nlogging_dir: logs\nclass_data_dir: class\n")
    environment = dict(os.environ)
    parse("--config", "../options.yaml", "--with_prior_preservation", "--class_prompt", "dog")
    assert {path.name for path in tmp_path.rglob("*")} == {"here", "options.yaml"}
    assert dict(os.environ) == environment


# ---- what is refused ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resolutoin", "64"], "--resolutoin"),
        (["--resol", "64"], "--resol"),
        (["dog"], "dog"),
        (["--resolution"], "--resolution"),
        (["--resolution", "big"], "--resolution.*'big'"),
        (["--resolution", "64.5"], "--resolution.*'64.5'"),
        (["--learning_rate", "fast"], "--learning_rate.*'fast'"),
        (["--center_crop", "maybe"], "--center_crop.*maybe"),
        (["--lr_scheduler", "cosin"], "--lr_scheduler.*'cosin'.*cosine_with_restarts"),
        (["--mixed_precision", "fp8"], "--mixed_precision.*'fp8'.*bf16"),
        (["--validation_prompt"], "--validation_prompt"),
        (["--max_train_time", "soon"], "--max_train_time soon"),
        (["--allow_config_change"], "--allow_config_change.*--resume_from_checkpoint"),
        (["--config"], "--config"),
        (["--config="], "--config"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(capsys, flags, words):
    assert re.search(words, refusal(capsys, *flags))


@pytest.mark.parametrize(
    "text, words",
    [
        ("resolutoin: 64", "resolutoin"),
        ("resolutoin: null", "resolutoin"),
        ("resol: 64", "resol"),
        ("config: another.yaml", "config"),
        ("resolution: big", "--resolution.*'big'"),
        ("resolution: 64.5", "--resolution.*'64.5'"),
        ("resolution: [64, 128]", "128"),
        ("learning_rate: 5e-4f", "--learning_rate.*'5e-4f'"),
        ("learning_rate: {a: 1}", "--learning_rate.*'a=1'"),
        ("center_crop: maybe", "--center_crop.*maybe"),
        ("lr_scheduler: cosin", "--lr_scheduler.*'cosin'"),
        ("mixed_precision: off", "--mixed_precision.*'off'"),
        ("kron_factors: {to_k: 64}", "--kron_factors to_k=64: "),
        ("kron_factors: {to_k: [8]}", "--kron_factors to_k=8: "),
        ("kron_factors: {to_k: [d_in, 8]}", "--kron_factors to_k=d_in,8: d_in .*d_out/8"),
        ("kron_a1: 4\nkron_b1: 8", "--kron_b1 8 and --kron_a1 4"),
        ("kron_b1: d_out", "--kron_b1.*'d_out'"),
        ("validation_prompt:\n- a dog: on the beach", "validation_prompt"),  # a mapping, since it is not quoted
        ("validation_prompt:\n- a dog\n-", "validation_prompt"),
        ("- resolution\n- 64", "expected lines of the form 'option: value'"),
        ("resolution", "expected lines of the form 'option: value'"),
        ("", "expected lines of the form 'option: value'"),
        ("resolution: [64", "while parsing a flow sequence.*line 1"),
    ],
)
def test_a_wrong_file_is_refused_by_name(capsys, write_yaml, text, words):
    assert re.search(words, refusal(capsys, *write_yaml(text)), re.DOTALL)


@pytest.mark.parametrize("name", ["missing.yaml", "folder", "latin1.yaml"])
def test_a_file_that_cannot_be_read_is_named(capsys, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1.yaml").write_bytes("instance_prompt: ein Hündchen".encode("latin-1"))
    assert refusal(capsys, "--config", str(tmp_path / name)).startswith(f"--config {tmp_path / name}: ")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_option_is_named(capsys, write_yaml, name):
    others = {other: value for other, value in REQUIRED.items() if other != name}
    for flags in ([], write_yaml("resolution: 64"), write_yaml(f"{name}: null")):
        message = refusal(capsys, *flags, required=others)
        assert f"--{name}" in message and not any(f"--{other}" in message for other in others)


PRIOR = "--with_prior_preservation"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--report_to all", ["--report_to", "'all'", "trackio"]),
        ("--report_to wandb comet_ml", ["--report_to", "'comet_ml'", "trackio"]),
        ("--report_to none wandb", ["--report_to none"]),
        *(
            (f"--kron_factors to_q=4,64 {entry}", [f"--kron_factors {entry}: ", "to_k=8,64"])
            for entry in (
                "to_k",
                "to_k=",
                "to_k=8",
                "to_k=8,64,2",
                "=8,64",
                "to_k=a,b",
                "to_k=-8,64",
                "to_k=8,²",
                "to_k=0,64",
                "to_k=d_in,8",
                "to_k=8,d_out/2",
                "to_k=8,d_in/0",
                f"to_k=8,{'9' * 5000}",
            )
        ),
        ("--kron_factors to_q=4,64 to_k=8,8 to_q=2,2", ["--kron_factors to_q=2,2: "]),
        ("--kron_a1 4 --kron_b1 8", ["--kron_b1 8", "--kron_a1 4", "--kron_a1 d_out/8"]),
        ("--kron_a2 d_in --kron_b2 8", ["--kron_b2 8", "--kron_a2 d_in", "--kron_a2 d_in/8"]),
        *((f"--kron_a1 {size}", [f"--kron_a1 {size}: ", "d_out/8"]) for size in ("d_in", "d_out/0", "4.0", "x", "²")),
        *((f"--kron_a2 {size}", [f"--kron_a2 {size}: ", "d_in/8"]) for size in ("d_out/4", "8/d_in", "9" * 5000)),
        *(
            (f"--kron_{letter} {size}", [f"--kron_{letter} ", "at least 1"])
            for letter in ("a1", "b2")
            for size in (0, -4)
        ),
        ("--train_text_encoder --text_encoder_kron_a2 d_out", ["--text_encoder_kron_a2 d_out: ", "d_in/8"]),
        ("--compile --base_precision nf4", ["--compile", "--base_precision nf4"]),
        ("--tracker_run_name ../rex", ["--tracker_run_name ../rex"]),
        ("--text_encoder_lr 1", ["--text_encoder_lr", "--train_text_encoder"]),
        ("--text_encoder_kron_a1 2", ["--text_encoder_kron_a1", "--train_text_encoder"]),
        ("--text_encoder_kron_a2 2", ["--text_encoder_kron_a2", "--train_text_encoder"]),
        ("--class_prompt dog", ["--class_prompt", PRIOR]),
        ("--class_data_dir class", ["--class_data_dir", PRIOR]),
        (f"{PRIOR}", [PRIOR, "--class_prompt"]),
        (f"{PRIOR} --class_data_dir class", [PRIOR, "--class_prompt"]),
        (f"{PRIOR} --class_prompt dog", [PRIOR, "--class_data_dir"]),
        (f"{PRIOR} --class_prompt dog --class_data_dir photos", ["--class_data_dir", "--instance_data_dir"]),
        (f"{PRIOR} --class_prompt dog --class_data_dir x/../photos/.", ["--class_data_dir", "--instance_data_dir"]),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(capsys, flags, words):
    message = refusal(capsys, *flags.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "flags, warning",
    [
        ("--lr_warmup_steps 10", "--lr_warmup_steps 10 .* with --lr_scheduler constant, only with .*linear, cosine"),
        ("--lr_warmup_steps 10 --lr_scheduler cosine", None),
        ("--lr_power 2 --lr_scheduler cosine", "--lr_power 2.0 .* with --lr_scheduler cosine, only with polynomial$"),
        ("--lr_num_cycles 2", "--lr_num_cycles 2 .* with --lr_scheduler constant, only with cosine_with_restarts$"),
        ("--huber_c 0.2", "--huber_c 0.2 .* with --loss_type mse, only with huber$"),
        ("--huber_c 0.2 --loss_type huber", None),
        ("--num_train_epochs 3 --max_train_steps 9", "--num_train_epochs 3 has no effect with --max_train_steps 9$"),
        ("--num_train_epochs 3", None),
        ("--validation_steps 5", "--validation_steps 5 has no effect without --validation_prompt$"),
        ("--num_validation_images 1", "--num_validation_images 1 .* without --validation_prompt$"),
        ("--validation_guidance_scale 1", "--validation_guidance_scale 1.0 .* without --validation_prompt$"),
        (
            "--validation_epochs 5 --validation_steps 5 --validation_prompt sks",
            "5 has no .* with --validation_steps 5$",
        ),
        ("--validation_epochs 5 --validation_prompt sks", None),
        ("--num_class_images 9", f"--num_class_images 9 has no effect without {PRIOR}$"),
        ("--prior_loss_weight 0.5", f"--prior_loss_weight 0.5 has no effect without {PRIOR}$"),
        (
            f"--num_class_images 9 {PRIOR} --class_prompt dog --prior_source base_model",
            "--num_class_images 9 has no effect with --prior_source base_model, only with images$",
        ),
        (f"--num_class_images 9 {PRIOR} --class_prompt dog --class_data_dir class", None),
        ("--hub_model_id me/dog", "--hub_model_id me/dog has no effect without --push_to_hub$"),
        ("--hub_token hf_secret", "--hub_token has no effect without --push_to_hub$"),
        ("--tracker_group pets", "--tracker_group pets .* with --report_to tensorboard, only with wandb, trackio$"),
        ("--tracker_group pets --report_to tensorboard wandb", None),
        ("--tracker_run_name rex --report_to none", "--tracker_run_name rex .* with --report_to none, only with tens"),
        ("--validation_epochs 50 --lr_power 1", None),  # the defaults
    ],
)
def test_an_option_without_effect_is_warned_of_once(capsys, monkeypatch, flags, warning):
    parse(*flags.split())
    said = capsys.readouterr().err
    assert not said if warning is None else re.search(f"^warning: .*{warning}", said.removesuffix("\n"))
    assert said.count("\n") == (warning is not None) and "hf_secret" not in said
    monkeypatch.setenv("RANK", "1")
    parse(*flags.split())
    assert not capsys.readouterr().err


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_options_need_options_of_the_same_script_and_values_that_those_can_have(config_class):
    kinds, declared = (
        {field.name: str(field.type) for field in dataclasses.fields(config_class)},
        declarations(config_class),
    )
    for name, declaration in declared.items():
        for other, values in declaration.needs.items():
            assert other in declared, f"{name} needs {other}"
            offered = declared[other].choices or ()
            assert all(value in offered or repr(value) in kinds[other] or value is True for value in values)


def test_every_group_s_own_rules_are_checked_once_bases_first():
    called = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Base:
        x: int = option("A number.", 1)

        def check(self):
            called.append("Base")

    class Silent(Base):
        pass

    class Left(Silent):
        def check(self):
            called.append("Left")

    class Right(Base):
        def check(self):
            called.append("Right")

    class Both(Left, Right):
        pass

    check_options(Both())
    assert sorted(called) == ["Base", "Left", "Right"] and called[0] == "Base"


# ---- bounds ----


def example(config_class, **changes):
    """Options of a class, with the required ones filled in, before any check."""
    required = {
        field.name: ["x"] if field.type == list[str] else "x"
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    return config_class(**required | changes)


def numbers(config_class):
    """The fields that hold numbers, and the type of those."""
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    for name in types:
        for kind in (int, float):
            if kind in (types[name], *getattr(types[name], "__args__", ())):
                yield name, kind


def edges(bounds, kind):
    """Values just outside of bounds, and values at them."""
    step = bounds.multiple_of or (1 if kind is int else 1e-6)
    outside, inside = [], []
    for limit, direction, is_allowed in (
        (bounds.at_least, -1, True),
        (bounds.above, -1, False),
        (bounds.at_most, 1, True),
        (bounds.below, 1, False),
    ):
        if limit is not None:
            outside.append(kind(limit + direction * step if is_allowed else limit))
            inside.append(kind(limit if is_allowed else limit - direction * step))
    if bounds.multiple_of:
        outside.append(inside[0] + 1)
    return outside, inside


BOUNDED = [
    pytest.param(config_class, name, kind, id=f"{script}-{name}")
    for script, config_class in SCRIPTS.items()
    for name, kind in numbers(config_class)
]


@pytest.mark.parametrize("config_class, name, kind", BOUNDED)
def test_a_number_keeps_its_bounds_and_may_reach_them(config_class, name, kind):
    outside, inside = edges(declarations(config_class)[name].bounds, kind)
    if kind is float:
        outside += [math.nan, math.inf, -math.inf]
    for value in outside:
        with pytest.raises(UserError, match=f"^--{name} is {re.escape(str(value))}; "):
            check_options(example(config_class, **{name: value}))
    for value in inside:
        check_values(example(config_class, **{name: value}))


def test_the_command_line_keeps_the_bounds_too(capsys):
    for name, kind in numbers(Config):
        for value in edges(declarations(Config)[name].bounds, kind)[0]:
            assert f"--{name} is {value}; " in refusal(capsys, f"--{name}={value}")


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_counts_have_a_lower_bound(config_class):
    """A whole number here counts something, or is a size or a seed."""
    for name, kind in numbers(config_class):
        bounds = declarations(config_class)[name].bounds
        assert kind is float or bounds.at_least is not None or bounds.above is not None, name


def test_the_numbers_of_a_list_are_checked_one_by_one():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Several:
        sizes: list[int] = option("Sizes, px.", [8, 16], at_least=8)

    check_options(Several())
    with pytest.raises(UserError, match="--sizes is 7; "):
        check_options(Several(sizes=[8, 7]))


# ---- flags that are not ours ----


def test_the_nearest_flag_is_suggested(capsys):
    message = refusal(capsys, "--resolutoin", "64", "--Kron-a1=3")
    assert re.search("--resolutoin: .*--resolution.*\n--Kron-a1: .*--kron_a1", message)


def test_a_pasted_command_of_another_trainer_is_answered_flag_by_flag(capsys):
    pasted = "--pretrained_model_name_or_path x --network_dim 8 --train_data_dir photos --no_half_vae --output_name=dog"
    lines = refusal(capsys, *pasted.split(), required={}).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "--network_dim", "--train_data_dir", "--no_half_vae", "--output_name",
    ]  # fmt: skip
    assert all(line.endswith(ANSWERS[line.partition(":")[0][2:]]) for line in lines)


def test_a_file_is_answered_too(capsys, write_yaml):
    assert ANSWERS["rank"] in refusal(capsys, *write_yaml("rank: 4"))


@pytest.mark.parametrize("config_class, own", [(Config, KroneckerOptions), (LORA, LoraOptions)])
def test_an_answer_names_flags_that_there_are_for_a_flag_that_there_is_not(config_class, own):
    names = list(declarations(config_class))
    for flags, sentence in (*TABLE, *own.foreign):
        assert set(flags_in(sentence)) <= {*names, "config"}
        for flag in flags.split():
            assert flag not in names and explain_unknown(flag, config_class) == sentence
        for script in re.findall(r"scripts/\w+\.py|configs/\w+", sentence):
            assert (ROOT / script).exists()


def test_an_answer_is_given_once():
    for own in (KroneckerOptions, LoraOptions):
        flags = [flag for flags, _ in (*TABLE, *own.foreign) for flag in flags.split()]
        assert len(flags) == len(set(flags))


def test_an_answer_that_names_what_a_script_lacks_is_not_given():
    assert explain_unknown("train_data_dir", Config) == ANSWERS["train_data_dir"]
    assert "--instance_prompt" not in explain_unknown("train_data_dir", generate.Config)


def test_what_accelerate_launch_takes_is_sent_there(monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.setattr(sys, "argv", ["accelerate", "launch"])  # its help depends on it

    theirs = launch_command_parser().format_help()
    (flags,) = (flags for flags, sentence in TABLE if "before the script's name" in sentence)
    assert all(f"--{flag}" in theirs for flag in flags.split())


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1", "--local_rank 1"])
def test_the_local_rank_that_torch_s_old_launcher_passes_is_ignored(flag):
    assert parse(*flag.split()) == DEFAULTS


# ---- secrets, and what decides the result ----


def test_a_secret_is_public_nowhere_and_a_word_like_token_is(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Words(Config):
        modifier_token: str = option("Token for the subject.", "<new1>")
        keyword: str = option("A word.", "dog")
        password: str | None = option("A secret.", None, secret=True)

    config = Words(**REQUIRED, hub_token="canary", password="canary")
    for options in (public_options(config), result_options(config)):
        assert options["modifier_token"] == "<new1>" and options["keyword"] == "dog"
        assert "canary" not in str(options)
    assert set(vars(config)) - set(public_options(config)) == {"hub_token", "password"}
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "canary" not in text and yaml.safe_load(text)["modifier_token"] == "<new1>"


def test_what_decides_the_result_is_said_by_the_field():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two:
        size: int = option("Size, px.", 1)
        place: str = option("Folder.", "here", decides_result=False)

    assert result_options(Two(size=2)) == {"size": 2}
    assert result_options(DEFAULTS).items() <= public_options(DEFAULTS).items()
    assert {"output_dir", "cache_dir", "max_train_time"}.isdisjoint(result_options(DEFAULTS))
    assert {"seed", "learning_rate", "kron_a1", "resolution"} <= set(result_options(DEFAULTS))


# ---- declarations ----


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_every_option_is_declared_once_and_explained(config_class):
    grouped = [name for group in groups_of(config_class).values() for name in group]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(config_class))
    for name, declared in declarations(config_class).items():
        assert len(declared.help) > 10 and declared.help.endswith((".", "]}")), name
        assert re.findall(r"--\w+", declared.help) == [], "in a help text options have no dashes"


def test_a_class_below_may_change_a_default_and_nothing_else():
    assert declarations(sdxl.Config)["resolution"] == declarations(Config)["resolution"]
    assert sdxl.Config(**REQUIRED).resolution != DEFAULTS.resolution
    with pytest.raises(UserError, match="--resolution is 100; "):
        check_options(sdxl.Config(**REQUIRED, resolution=100))


def test_a_field_that_is_not_declared_is_an_error():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bare:
        x: int = 1

    with pytest.raises(TypeError, match="Bare.x"):
        declarations(Bare)


def test_options_are_declared_without_torch():
    code = "import sys, dreambooth.options.parsing, dreambooth.options.kronecker, dreambooth.options.training as t"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "diffusers", "kron_adapter"} & set(result.stdout.split())


# ---- and back ----

EVERYTHING = """
    --pretrained_model_name_or_path hub/model --revision main --variant fp16 --max_token_length 150
    --instance_data_dir "my photos" --instance_prompt 'a "sks" dog: #1 🐶' --resolution 64 --center_crop
    --image_interpolation_mode box --with_prior_preservation --prior_loss_weight 0.5 --class_data_dir 07
    --class_prompt null --num_class_images 7 --sample_batch_size 2 --prior_num_inference_steps 9
    --prior_guidance_scale 1e-3 --prior_negative_prompt "  blurry,\nno " --prior_seed 5 --kron_a1 8 --kron_a2 32
    --kron_factors to_k=8,64 attn2.to_v=1,d_in --kron_targets to_q to_k --kron_init reference
    --kron_lr attn2=0.02 're:up.*(?=to_k)=1e-3' --scale_weight_norms 1
    --output_dir "~" --seed 4294967295 --init_adapter dog.safetensors --base_adapter a.safetensors:0.5 b
    --overwrite_output_dir --train_batch_size 2 --gradient_accumulation_steps 3 --max_train_steps 10
    --num_train_epochs 4 --learning_rate 1e-5 --scale_lr --lr_scheduler cosine --lr_warmup_steps 3 --lr_num_cycles 2
    --lr_power 2 --use_8bit_adam --adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0 --adam_epsilon 1e-20
    --max_grad_norm 1e9 --mixed_precision no --gradient_checkpointing --allow_tf32
    --enable_xformers_memory_efficient_attention --dataloader_num_workers 2 --checkpointing_steps 5
    --checkpoints_total_limit 1 --resume_from_checkpoint latest --allow_config_change --on_save_error continue
    --max_train_time 1:30:00 --validation_prompt "a, b" yes "{c}"
    --save_precision fp16 --num_validation_images 2 --validation_epochs 3 --validation_steps 7
    --validation_num_inference_steps 8
    --validation_guidance_scale 2 --report_to wandb tensorboard --logging_dir tensorboard --vae_precision fp16
    --base_config hub/configuration --prediction_type v_prediction --rescale_betas_zero_snr
    --pretrained_vae_model_name_or_path hub/vae --base_precision nf4 --caption_column words
    --caption_dropout_probability 0.1 --repeats 3 --unmasked_weight 0.2 --random_flip --aspect_ratio_buckets
    --cache_latents on --cache_latents_to_disk "~/latents" --train_text_encoder --text_encoder_lr 1e-6
    --text_encoder_kron_a1 2 --text_encoder_kron_a2 d_in/16 --snr_gamma 5 --noise_offset 0.05 --loss_type huber
    --huber_c 0.2 --min_timestep 1 --max_timestep 900 --timestep_sampling thinned --channels_last --ema_decay 0.9
    --tracker_project_name dogs --tracker_run_name rex --tracker_group pets --no_metadata
    --push_to_hub --hub_model_id me/dog --cache_dir "~/hub" --logging_steps 4 --skip_nonfinite 2
    --holdout 2 --score_checkpoints --score_photos --reference_dir "other photos"
"""
# what does not work with the above
REST = """
    --pretrained_model_name_or_path hub/model --instance_prompt sks --dataset_name hub/photos --image_column photo
    --dataset_config_name small --with_prior_preservation --prior_source base_model --class_prompt dog
    --optimizer prodigy --compile --hub_token hf_secret --kron_b1 8 --kron_b2 2
"""
SEVERAL = """
    --pretrained_model_name_or_path hub/model --instance_data_dir photos
    --subjects "{a/dog: {instance_prompt: 'sks #1: 🐶', class_prompt: dog}, cat: {instance_prompt: null and 5e-4}}"
"""


def test_a_saved_config_reads_back_as_it_was(tmp_path):
    configs = [parse(*shlex.split(line), required={}) for line in (EVERYTHING, REST, SEVERAL)]
    unchanged = [
        field.name
        for field in FIELDS
        if all(getattr(config, field.name) == getattr(DEFAULTS, field.name) for config in configs)
    ]
    assert not unchanged, f"give these another value in EVERYTHING: {unchanged}"
    for saved in (*configs, DEFAULTS):
        save_config(saved, tmp_path / "config.yaml")
        assert parse("--config", str(tmp_path / "config.yaml"), required={}) == dataclasses.replace(
            saved, hub_token=None
        )
        written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        assert set(written) == {name for name, value in vars(saved).items() if value not in (None, [])} - {"hub_token"}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# ---- flags, fields and their readers ----


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=SCRIPTS)
def test_help_explains_every_flag_by_topic(capsys, monkeypatch, config_class):
    monkeypatch.setenv("COLUMNS", "1000")  # one line each
    with pytest.raises(SystemExit) as exit:
        parse_options(config_class, "On one GPU:\n    accelerate launch train.py", ["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "On one GPU:\n    accelerate launch train.py\n" in text
    for group, options in groups_of(config_class).items():
        (section,) = re.findall(rf"^{re.escape(group.__doc__.rstrip('.'))}:\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
        entries = re.split(r"^  (?=-)", section, flags=re.MULTILINE)[1:]
        for (name, declared), entry in zip(options.items(), entries, strict=True):
            assert re.match(rf"--{name}[ ,]", entry) and declared.help in entry


def fields_read(path):
    """The attributes that a file reads of what is called config; among the options, those that methods read."""
    name = "self" if path.parent == ROOT / "dreambooth" / "options" else "config"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = {  # an option that is only checked does nothing
        attribute
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "check"
        for attribute in ast.walk(function)
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (name, "self.config") and node not in checks
    }


def test_every_field_is_read_somewhere():
    sources = {*ROOT.glob("*.py"), *ROOT.glob("dreambooth/**/*.py")}
    assert not {field.name for field in FIELDS} - set().union(*map(fields_read, sources))


# ---- how a program ends ----


@pytest.mark.parametrize("error, code", [(UserError, 2), (KroneckerError, 2), (SaveError, 74)])
def test_errors_that_the_user_can_mend_end_the_program_with_their_message(error, code, capsys):
    with pytest.raises(SystemExit) as exit, readable_errors():
        raise error("no photos")
    assert exit.value.code == code
    assert capsys.readouterr().err == f"error: {error('no photos')}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError
