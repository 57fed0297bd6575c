"""Options: from YAML and the command line to a config, what is refused and in which words, and back to YAML."""

import ast
import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dreambooth.errors import SaveError, UserError, readable_errors
from dreambooth.options.parsing import parse_options
from dreambooth.options.yaml_file import save_config
from train_dreambooth_kronecker import Config

ROOT = Path(__file__).parents[2]
REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": "sks dog"}
DEFAULTS = Config(**REQUIRED)
FIELDS = dataclasses.fields(Config)


def parse(*flags, required=REQUIRED):
    return parse_options(Config, "What the script does.", [*flags, *(f"--{k}={v}" for k, v in required.items())])


def refusal(capsys, *flags, required=REQUIRED):
    """What is said about flags that are refused, without the usage that argparse puts before it."""
    with pytest.raises(SystemExit) as exit:
        parse(*flags, required=required)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err.partition("error: ")[2]


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
    config = parse("--kron_factors", "to_k=8,64", "attn2.to_out.0= 4, 32")
    assert config.factors_by_target() == {"to_k": (8, 64), "attn2.to_out.0": (4, 32)}
    assert DEFAULTS.factors_by_target() == {}


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
        (["--max_train_time", "soon"], "--max_train_time soon: write a time above 0"),
        (["--allow_config_change"], "--allow_config_change needs --resume_from_checkpoint"),
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


AT_LEAST_ONE = (
    "train_batch_size gradient_accumulation_steps checkpointing_steps num_class_images sample_batch_size "
    "num_validation_images validation_epochs prior_num_inference_steps validation_num_inference_steps lr_num_cycles "
    "max_train_steps num_train_epochs checkpoints_total_limit validation_steps resolution"
).split()
NOT_NEGATIVE = (
    "seed lr_warmup_steps dataloader_num_workers learning_rate prior_loss_weight adam_weight_decay adam_epsilon "
    "adam_beta1 adam_beta2"
).split()
FRACTIONS = [field.name for field in FIELDS if field.type is float]
PRIOR = "--with_prior_preservation"


@pytest.mark.parametrize(
    "flags, words",
    [
        *((f"--{name} {value}", [f"--{name} is {value}", "at least 1"]) for name in AT_LEAST_ONE for value in (0, -5)),
        *((f"--{name}=-1", [f"--{name} is -1", "negative"]) for name in NOT_NEGATIVE),
        *((f"--{name} {value}", [f"--{name} is {value}"]) for name in FRACTIONS for value in ("nan", "inf")),
        ("--resolution 100", ["--resolution is 100", "multiple of 8"]),
        (f"--seed {2**32}", [f"--seed is {2**32}"]),  # NumPy's generators take no more
        ("--max_grad_norm 0", ["--max_grad_norm is 0.0"]),  # every gradient would become 0
        ("--max_grad_norm=-1", ["--max_grad_norm is -1.0"]),  # and here turn around
        ("--adam_beta1 1", ["--adam_beta1 is 1.0"]),
        ("--adam_beta2 1.5", ["--adam_beta2 is 1.5"]),
        ("--report_to all", ["--report_to all", "tensorboard, wandb, trackio or none"]),
        ("--report_to wandb comet_ml", ["--report_to comet_ml", "tensorboard, wandb, trackio or none"]),
        ("--report_to none wandb", ["--report_to none"]),
        *(
            (f"--kron_factors to_q=4,64 {entry}", [f"--kron_factors {entry}: ", "for example to_k=8,64"])
            for entry in ("to_k", "to_k=", "to_k=8", "to_k=8,64,2", "=8,64", "to_k=a,b", "to_k=-8,64", "to_k=8,²")
        ),
        ("--class_prompt dog", ["--class_prompt", PRIOR]),
        ("--class_data_dir class", ["--class_data_dir", PRIOR]),
        (f"{PRIOR}", [PRIOR, "needs --class_prompt"]),
        (f"{PRIOR} --class_data_dir class", [PRIOR, "needs --class_prompt"]),
        (f"{PRIOR} --class_prompt dog", [PRIOR, "needs --class_data_dir"]),
        (f"{PRIOR} --class_prompt dog --class_data_dir photos", ["--class_data_dir and --instance_data_dir are the"]),
        (f"{PRIOR} --class_prompt dog --class_data_dir x/../photos/.", ["--class_data_dir and --instance_data_dir"]),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(capsys, flags, words):
    message = refusal(capsys, *flags.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--{name} {8 if name == 'resolution' else 1}" for name in AT_LEAST_ONE),
        *(f"--{name} 0" for name in NOT_NEGATIVE),
        f"--seed {2**32 - 1}",
        "--report_to none",
        f"{PRIOR} --class_prompt dog --class_data_dir photos/class",
    ],
)
def test_the_limits_themselves_are_allowed(flags):
    parse(*flags.split())


# ---- and back ----

EVERYTHING = """
    --pretrained_model_name_or_path hub/model --revision main --variant fp16
    --instance_data_dir "my photos" --instance_prompt 'a "sks" dog: #1 🐶' --resolution 64 --center_crop
    --image_interpolation_mode box --with_prior_preservation --prior_loss_weight 0.5 --class_data_dir 07
    --class_prompt null --num_class_images 7 --sample_batch_size 2 --prior_num_inference_steps 9
    --prior_guidance_scale 1e-3 --prior_negative_prompt "  blurry,\nno " --kron_a1 8 --kron_a2 32
    --kron_factors to_k=8,64 to_v=4,4 --kron_targets to_q to_k --kron_init reference
    --output_dir "~" --seed 4294967295
    --overwrite_output_dir --train_batch_size 2 --gradient_accumulation_steps 3 --max_train_steps 10
    --num_train_epochs 4 --learning_rate 1e-5 --scale_lr --lr_scheduler cosine --lr_warmup_steps 3 --lr_num_cycles 2
    --lr_power 2 --use_8bit_adam --adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0 --adam_epsilon 1e-20
    --max_grad_norm 1e9 --mixed_precision no --gradient_checkpointing --allow_tf32
    --enable_xformers_memory_efficient_attention --dataloader_num_workers 2 --checkpointing_steps 5
    --checkpoints_total_limit 1 --resume_from_checkpoint latest --allow_config_change --on_save_error continue
    --max_train_time 1:30:00 --validation_prompt "a, b" yes "{c}"
    --save_precision fp16 --num_validation_images 2 --validation_epochs 3 --validation_steps 7
    --validation_num_inference_steps 8
    --validation_guidance_scale 2 --report_to wandb tensorboard --logging_dir "" --vae_precision fp16
    --pretrained_vae_model_name_or_path hub/vae --base_precision nf4 --caption_column words
    --caption_dropout_probability 0.1 --repeats 3 --unmasked_weight 0.2 --random_flip --aspect_ratio_buckets
    --cache_latents on --cache_latents_to_disk "~/latents" --train_text_encoder --text_encoder_lr 1e-6
    --text_encoder_kron_a1 2 --text_encoder_kron_a2 16 --snr_gamma 5 --noise_offset 0.05 --loss_type huber
    --save_precision fp16 --huber_c 0.2 --min_timestep 1 --max_timestep 900 --channels_last
    --push_to_hub --hub_model_id me/dog --logging_steps 4 --skip_nonfinite 2
"""
# what does not go with the above
REST = """
    --pretrained_model_name_or_path hub/model --instance_prompt sks --dataset_name hub/photos --image_column photo
    --dataset_config_name small --with_prior_preservation --prior_source base_model --class_prompt dog
    --optimizer prodigy --compile --hub_token hf_secret
"""


def test_a_saved_config_reads_back_as_it_was(tmp_path):
    configs = [parse(*shlex.split(line), required={}) for line in (EVERYTHING, REST)]
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


def test_help_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line each
    with pytest.raises(SystemExit) as exit:
        parse_options(Config, "On one GPU:\n    accelerate launch train.py", ["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "On one GPU:\n    accelerate launch train.py\n" in text
    entries = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    for field in FIELDS:
        (entry,) = (entry for entry in entries if re.match(rf"--{field.name}[ ,]", entry))
        assert len(field.metadata["help"]) > 10 and field.metadata["help"] in entry


def fields_read(path):
    """The attributes that a file reads of what is called config; in the config's own file, those that methods read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = "self" if path == ROOT / "dreambooth" / "config.py" else "config"
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (name, "self.config")
    }


def test_every_field_is_read_somewhere():
    sources = {*ROOT.glob("*.py"), *ROOT.glob("dreambooth/*.py")}
    sources.remove(ROOT / "dreambooth" / "checks.py")  # an option that is only checked does nothing
    assert not {field.name for field in FIELDS} - set().union(*map(fields_read, sources))


# ---- how a program ends ----


@pytest.mark.parametrize("error, code", [(UserError, 2), (KeyError, 2), (SaveError, 74)])
def test_errors_that_the_user_can_mend_end_the_program_with_their_message(error, code, capsys):
    with pytest.raises(SystemExit) as exit, readable_errors(KeyError):
        raise error("no photos")
    assert exit.value.code == code
    assert capsys.readouterr().err == f"error: {error('no photos')}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError
