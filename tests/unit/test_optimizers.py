"""Optimizers over many small factors, against the same ones over single tensors; what is saved, resumed and refused."""

import copy
import logging
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.loop.optimizers import (
    build_lr_scheduler,
    build_optimizer,
    check_optimizer,
    check_warmup,
    evaluating,
    load_optimizer_state,
)
from dreambooth.method import Group, adapter_groups
from dreambooth.options.checking import check_options
from dreambooth.output.checkpoint import read_state, write_state
from kron_adapter import (
    inject_kronecker,
    kronecker_parameters,
    kronecker_state_dict,
    load_kronecker,
    load_kronecker_state_dict,
    save_kronecker,
)
from train_dreambooth_kronecker import Config

NAMES = ["AdamW", "8-bit AdamW", "Prodigy", "Adafactor", "ScheduleFreeAdamW"]
PACKAGES = {"8-bit AdamW": "bitsandbytes", "Prodigy": "prodigyopt", "ScheduleFreeAdamW": "schedulefree"}


def config(**options) -> Config:
    return Config(pretrained_model_name_or_path="base", instance_data_dir="photos", instance_prompt="sks", **options)


def config_for(name: str, **options) -> Config:
    """The options for one of NAMES, with a learning rate that suits it."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name == "8-bit AdamW":
        return config(**{"use_8bit_adam": True, "learning_rate": 1e-2, **options})
    return config(**{"optimizer": name, "learning_rate": 1.0 if name == "Prodigy" else 1e-2, **options})


class Model(nn.Module):
    """Two adapted layers: one in a "unet" and one in a "text_encoder"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.Sequential(nn.Linear(64, 320))  # B is (80, 64): above the 4,096 that 8-bit state begins at
        self.text_encoder = nn.Sequential(nn.Linear(320, 6))
        inject_kronecker(self.unet, 4, 1, ["0"])
        inject_kronecker(self.text_encoder, 3, 5, ["0"])  # B is (2, 64), A (3, 5): no multiple of a vector's width

    def forward(self, x):
        return self.text_encoder(torch.tanh(self.unet(x)))

    @property
    def factors(self) -> dict[str, list[nn.Parameter]]:
        return {name: kronecker_parameters(getattr(self, name)) for name in ("unet", "text_encoder")}

    def groups(self, config: Config) -> list[Group]:
        return adapter_groups(SD, self.factors, config)


def optimizer_of(model: Model, config: Config, num_ranks: int = 1) -> torch.optim.Optimizer:
    return build_optimizer(model.groups(config), config, num_ranks)


X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))


def loss_of(model, rows=slice(None)):
    return nn.functional.mse_loss(model(X[rows]), Y[rows])


def train(model, optimizer, steps):
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [factor.detach().clone() for factors in model.factors.values() for factor in factors]


def assert_equal(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


# ---- learning rates ----


def test_learning_rate_is_scaled_by_samples_per_step_only_if_asked():
    options = {"learning_rate": 1e-3, "text_encoder_lr": 1e-4, "train_batch_size": 2, "gradient_accumulation_steps": 3}
    rates = [group["lr"] for group in optimizer_of(Model(), config(**options), 4).param_groups]
    assert rates == [1e-3, 1e-4]
    optimizer = optimizer_of(Model(), config(**options, scale_lr=True), 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([24e-3, 24e-4])


@pytest.mark.parametrize("text_encoder_lr, expected", [(None, 1e-3), (0.0, 0.0)])
def test_text_encoders_train_at_the_common_learning_rate_unless_they_have_their_own(text_encoder_lr, expected):
    options = config(learning_rate=1e-3, text_encoder_lr=text_encoder_lr)
    model = Model()
    assert optimizer_of(model, options).param_groups[1]["lr"] == expected
    (unet,) = adapter_groups(SD, {"unet": Model().factors["unet"]}, options)
    assert len(build_optimizer([unet], options, 1).param_groups) == 1


def test_groups_are_the_denoiser_s_and_all_text_encoders_together():
    denoiser, first, second = ([nn.Parameter(torch.zeros(1))] for _ in range(3))
    parameters = {"unet": denoiser, "text_encoder": first, "text_encoder_2": second}
    options = config(learning_rate=1e-3, text_encoder_lr=1e-4, adam_weight_decay=0.5)
    own, text = adapter_groups(SDXL, parameters, options)
    assert own.parameters == denoiser and text.parameters == first + second
    assert (own.learning_rate, text.learning_rate) == (1e-3, 1e-4)
    assert own.weight_decay == text.weight_decay == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_the_weight_decay_that_it_asks_for(name):
    groups = [replace(group, weight_decay=decay) for group, decay in zip(Model().groups(config()), (0.3, 0.0))]
    optimizer = build_optimizer(groups, config_for(name), 1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5]),
        ("cosine", [0, 0.5, 1, 0.5]),
    ],
)
def test_learning_rate_schedule_in_optimizer_steps(name, expected):
    optimizer = optimizer_of(Model(), config(learning_rate=1.0, text_encoder_lr=0.1))
    lr_scheduler = build_lr_scheduler(optimizer, config(lr_scheduler=name, lr_warmup_steps=2), total_steps=4)
    rates = []
    for _ in expected:
        rates.append(lr_scheduler.get_last_lr())
        optimizer.step()
        lr_scheduler.step()
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([0.1 * rate for rate in expected])


# ---- what a step does ----


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name):
    model = Model()
    before = loss_of(model).item()
    optimizer = optimizer_of(model, config_for(name, adam_weight_decay=0.0))
    train(model, optimizer, 90)
    with evaluating(optimizer):
        assert loss_of(model).item() < 0.1 * before


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_the_first_step_of_a_factor_that_is_zero_is_the_learning_rate(name):
    model = Model()
    optimizer = optimizer_of(model, config_for(name, learning_rate=1e-3))
    train(model, optimizer, 1)
    B = model.unet[0].B.detach()
    assert B.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.2)


def reference(name, model):
    """The optimizer over single tensors, straight from its package, with options written out once more."""
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    groups = [{"params": factors, "lr": 1e-2} for factors in model.factors.values()]
    if name == "AdamW":
        groups[1]["lr"] = 3e-3
        return torch.optim.AdamW(groups, **options, foreach=False, fused=False)
    if name == "Prodigy":
        for group in groups:
            group["lr"] = 1.0
        package = pytest.importorskip("prodigyopt")
        return package.Prodigy(groups, **options, use_bias_correction=True, safeguard_warmup=True)
    groups[1]["lr"] = 3e-3
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(groups, **options, foreach=False)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "ScheduleFreeAdamW"])
def test_one_long_vector_is_stepped_as_the_single_factors_are(name):
    text_encoder_lr = None if name == "Prodigy" else 3e-3
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "adam_weight_decay": 0.1}
    flat, single = Model(), Model()
    optimizer = optimizer_of(flat, config_for(name, text_encoder_lr=text_encoder_lr, **adam))
    outsider = reference(name, single)
    for _ in range(10):
        train(flat, optimizer, 1)
        train(single, outsider, 1)
        assert_equal(values(flat), values(single), rtol=1e-4, atol=1e-6)


def test_a_group_s_factors_are_one_vector_and_keep_their_values_and_shapes():
    model = Model()
    before = values(model)
    optimizer = optimizer_of(model, config())
    assert_equal(values(model), before)
    for group, factors in zip(optimizer.param_groups, model.factors.values()):
        (vector,) = group["params"]
        assert vector.numel() == sum(factor.numel() for factor in factors)
        vector.data.fill_(7)
        vector.grad.fill_(8)
        assert all((factor == 7).all() and (factor.grad == 8).all() for factor in factors)


def test_the_adapter_s_files_and_state_dicts_work_on_factors_in_one_vector(tmp_path):
    model = Model()
    optimizer = optimizer_of(model, config())
    train(model, optimizer, 2)
    save_kronecker(model.unet, tmp_path / "adapter.safetensors")
    plain = nn.Sequential(nn.Linear(64, 320))
    load_kronecker(plain, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(plain[0].delta_weight, model.unet[0].delta_weight)
    load_kronecker_state_dict(model.unet, {k: torch.ones_like(v) for k, v in kronecker_state_dict(model.unet).items()})
    assert (optimizer.param_groups[0]["params"][0] == 1).all()


# ---- behind accelerate ----


def accelerate(mixed_precision="no", accumulation=1):
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_plugin=plugin)
    if mixed_precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu")  # as accelerate does by itself on a GPU
    return accelerator


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_those_of_the_whole_batch(name, fresh_accelerator):
    options = config_for(name)
    whole = Model()
    train(whole, optimizer_of(whole, options), 3)
    accelerator = accelerate(accumulation=2)
    model = Model()
    model, optimizer = accelerator.prepare(model, optimizer_of(model, options))
    for _ in range(3):
        for rows in (slice(0, 8), slice(8, 16)):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, rows))
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(values(model), values(whole), rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_overflows_changes_nothing(name, fresh_accelerator):
    accelerator = accelerate("fp16")
    model = Model()
    model, optimizer = accelerator.prepare(model, optimizer_of(model, config_for(name)))
    step = scaled_step(accelerator, model, optimizer)
    step()
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    assert accelerator.scaler.get_scale() == 2**16
    step(factor=float("inf"))
    assert accelerator.scaler.get_scale() == 2**15
    assert_equal(values(model), before)
    for ours, theirs in zip(tensors(optimizer.state_dict()["state"]), tensors(state), strict=True):
        assert torch.equal(ours, theirs)
    step()
    assert not torch.equal(values(model)[1], before[1])


def scaled_step(accelerator, model, optimizer):
    def step(factor=1.0):
        accelerator.backward(loss_of(model) * factor)
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tensors(state):
    return [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_saved_and_three_more_are_six_bit_for_bit(name, mixed_precision, fresh_accelerator, tmp_path):
    options = config_for(name, lr_scheduler="constant_with_warmup", lr_warmup_steps=5, adam_weight_decay=0.1)

    def start():
        accelerator = accelerate(mixed_precision)
        model = Model()
        optimizer = optimizer_of(model, options)
        lr_scheduler = build_lr_scheduler(optimizer, options, 6)
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, optimizer, lr_scheduler, scaled_step(accelerator, model, optimizer)

    def train_three(step, lr_scheduler):
        for _ in range(3):
            step()
            lr_scheduler.step()

    model, optimizer, lr_scheduler, step = start()
    train_three(step, lr_scheduler)
    factors = {f"{name}.{i}": factor for name, group in model.factors.items() for i, factor in enumerate(group)}
    state = {"factors": factors, "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()}
    write_state(tmp_path, state)
    with evaluating(optimizer):  # samples drawn in between
        model(X)
    train_three(step, lr_scheduler)
    uninterrupted = values(model)
    optimizer_state = tensors(optimizer.state_dict()["state"])

    model, optimizer, lr_scheduler, step = start()
    state = read_state(tmp_path)
    with torch.no_grad():
        for name, group in model.factors.items():
            for i, factor in enumerate(group):
                factor.copy_(state["factors"][f"{name}.{i}"])
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    train_three(step, lr_scheduler)
    assert_equal(values(model), uninterrupted)
    for ours, theirs in zip(tensors(optimizer.state_dict()["state"]), optimizer_state, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_are_not_flat_are_stepped_as_they_are_and_what_has_no_gradient_stays(name, tmp_path):
    """Three steps, saved, and three more are six. SDXL's first text encoder has layers that nothing reads."""
    options = config_for(name, adam_weight_decay=0.1)

    def start():
        model, unused = Model(), nn.Parameter(torch.ones(64, 80))
        text = [*model.factors["text_encoder"], unused]
        groups = [Group("UNet", model.factors["unet"], 1e-2, 0.1, False), Group("text", text, 1e-2, 0.1, False)]
        return model, unused, build_optimizer(groups, options, 1)

    model, unused, optimizer = start()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    schedule = build_lr_scheduler(optimizer, options, 6)
    train(model, optimizer, 3)
    assert unused.grad is None and all(factor.grad is None for factors in model.factors.values() for factor in factors)
    state = {"weights": values(model), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    write_state(tmp_path, state)
    train(model, optimizer, 3)
    assert torch.equal(unused, torch.ones(64, 80))

    other, _, resumed = start()
    state = read_state(tmp_path)
    with torch.no_grad():
        for factor, value in zip(
            [factor for factors in other.factors.values() for factor in factors], state["weights"]
        ):
            factor.copy_(value)
    schedule = build_lr_scheduler(resumed, options, 6)
    load_optimizer_state(resumed, schedule, state["optimizer"], state["schedule"])
    train(other, resumed, 3)
    assert_equal(values(other), values(model))


# ---- state dicts of the long vector ----


def test_saved_state_has_the_names_and_shapes_of_the_single_factors_and_each_loads_the_other_s():
    flat, single = Model(), Model()
    ours = optimizer_of(flat, config(learning_rate=1e-2))
    theirs = torch.optim.AdamW([{"params": factors, "lr": 1e-2} for factors in single.factors.values()], fused=True)
    train(flat, ours, 2)
    train(single, theirs, 2)
    one, other = ours.state_dict(), theirs.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert {(number, name): value.shape for number, entry in one["state"].items() for name, value in entry.items()} == {
        (number, name): value.shape for number, entry in other["state"].items() for name, value in entry.items()
    }
    ours.load_state_dict(other)
    theirs.load_state_dict(one)
    train(flat, ours, 2)
    train(single, theirs, 2)
    assert_equal(values(flat), values(single), rtol=1e-4, atol=1e-6)


def test_state_of_other_factors_is_refused():
    state = build_optimizer(Model().groups(config())[:1], config(), 1).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters"):
        optimizer_of(Model(), config()).load_state_dict(state)


@pytest.mark.parametrize("move", ["values", "gradients"])
def test_factors_that_left_the_vector_are_noticed(move):
    model = Model()
    optimizer = optimizer_of(model, config())
    train(model, optimizer, 1)
    if move == "values":
        model.to(torch.float64).to(torch.float32)
    else:
        model.zero_grad()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="no longer lies in the optimizer's buffers"):
        optimizer.step()


# ---- schedule-free ----


@pytest.mark.parametrize("wrapped", [False, True])
def test_inside_evaluating_the_factors_are_the_average_and_afterwards_as_before(wrapped, fresh_accelerator):
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "adam_weight_decay": 0.1}
    model, single = Model(), Model()
    optimizer = optimizer_of(model, config_for("ScheduleFreeAdamW", text_encoder_lr=3e-3, **options))
    if wrapped:
        model, optimizer = accelerate().prepare(model, optimizer)
    outsider = reference("ScheduleFreeAdamW", single)
    train(model, optimizer, 5)
    train(single, outsider, 5)
    outsider.eval()
    trained = values(model)
    with pytest.raises(KeyboardInterrupt), evaluating(optimizer):
        assert_equal(values(model), values(single), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(values(model)[1], trained[1], rtol=1e-2)
        raise KeyboardInterrupt
    assert_equal(values(model), trained)
    train(model, optimizer, 1)  # refuses to step unless it is back in training mode


def test_evaluating_before_the_first_step_changes_nothing():
    model = Model()
    optimizer = optimizer_of(model, config_for("ScheduleFreeAdamW"))
    before = values(model)
    with evaluating(optimizer):
        assert_equal(values(model), before)
    train(model, optimizer, 1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ScheduleFreeAdamW"])
def test_evaluating_changes_nothing_for_the_other_optimizers(name, fresh_accelerator):
    model = Model()
    plain = optimizer_of(model, config_for(name))
    model, wrapped = accelerate().prepare(model, plain)
    train(model, wrapped, 2)
    trained = values(model)
    for optimizer in (plain, wrapped):
        with evaluating(optimizer):
            assert_equal(values(model), trained)


@pytest.mark.parametrize("steps, warned", [(10, True), (11, False)])
def test_a_warm_up_that_outlasts_the_run_is_warned_of(steps, warned, caplog):
    check_warmup(config(lr_scheduler="cosine", lr_warmup_steps=10), steps)
    assert ("--lr_warmup_steps 10" in caplog.text and f"{steps} steps" in caplog.text) is warned
    check_warmup(config(lr_warmup_steps=10), 1)  # --lr_scheduler constant, which has another warning
    assert caplog.text.count("--lr_warmup_steps") == warned


# ---- what is refused ----


@pytest.mark.parametrize("name, package", PACKAGES.items())
def test_a_missing_package_is_named_with_its_pip_line(name, package, monkeypatch):
    options = {"use_8bit_adam": True} if name == "8-bit AdamW" else {"optimizer": name, "learning_rate": 1.0}
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    for use in (check_optimizer, lambda config: optimizer_of(Model(), config)):
        with pytest.raises(UserError, match=f"--.* needs a package that is not installed: pip install {package}"):
            use(config(**options))


@pytest.mark.parametrize("name", NAMES)
def test_installed_packages_are_found(name):
    check_optimizer(config_for(name))


@pytest.mark.parametrize("spelling", ["adamw", "AdamW", "PRODIGY", "adafactor", "schedule_free_adamw"])
def test_names_of_optimizers_are_read_in_any_case(spelling):
    check_options(config(optimizer=spelling))
    assert config(optimizer=spelling).optimizer_name().lower() == spelling.lower().replace("_", "")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "adam"}, "--optimizer adam: .*AdamW, Prodigy, Adafactor, ScheduleFreeAdamW"),
        (
            {"optimizer": "prodigy", "use_8bit_adam": True},
            "--use_8bit_adam .* --optimizer AdamW .* --optimizer Prodigy",
        ),
        ({"optimizer": "Adafactor", "use_8bit_adam": True}, "--use_8bit_adam .*--optimizer Adafactor"),
        ({"optimizer": "Prodigy", "learning_rate": 0.0}, "--optimizer Prodigy needs --learning_rate above 0"),
        ({"optimizer": "Prodigy", "adam_epsilon": 0.0}, "--optimizer Prodigy needs --adam_epsilon above 0"),
        ({"optimizer": "Prodigy", "scale_lr": True}, "--optimizer Prodigy .* --scale_lr"),
        (
            {"optimizer": "Prodigy", "train_text_encoder": True, "text_encoder_lr": 1e-4},
            "--optimizer Prodigy .* --text_encoder_lr",
        ),
        ({"optimizer": "Adafactor", "adam_beta1": 0.5}, "--adam_beta1 .* --optimizer Adafactor"),
        ({"optimizer": "Adafactor", "adam_beta2": 0.5}, "--adam_beta2 .* --optimizer Adafactor"),
        ({"optimizer": "Adafactor", "adam_epsilon": 1e-6}, "--adam_epsilon .* --optimizer Adafactor"),
        (
            {"optimizer": "ScheduleFreeAdamW", "lr_scheduler": "cosine"},
            "--optimizer ScheduleFreeAdamW .* --lr_scheduler cosine",
        ),
        ({"optimizer": "ScheduleFreeAdamW", "adam_beta1": 0.0}, "--optimizer ScheduleFreeAdamW .*--adam_beta1"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check_options(config(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"use_8bit_adam": True},
        {"optimizer": "Prodigy", "train_text_encoder": True, "text_encoder_lr": 1.0, "learning_rate": 1.0},
        {"optimizer": "Adafactor", "adam_weight_decay": 0.0, "lr_scheduler": "cosine"},
        {"optimizer": "ScheduleFreeAdamW", "lr_scheduler": "constant_with_warmup"},
    ],
)
def test_options_that_an_optimizer_takes(options):
    check_options(config(**options))


@pytest.mark.parametrize("learning_rate, warns", [(5e-4, True), (1.0, False)])
def test_prodigy_warns_about_a_learning_rate_that_is_far_from_1(learning_rate, warns, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer_of(Model(), config_for("Prodigy", learning_rate=learning_rate))
    assert ("--learning_rate" in caplog.text) == warns
