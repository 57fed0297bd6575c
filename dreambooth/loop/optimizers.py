"""Optimizers over what trains, and their learning-rate schedules.

An adapter has many small tensors, 1,120 for SDXL. AdamW, Prodigy and schedule-free AdamW work element by element, so
each group is stepped as one long vector (`FlatGroups`), many times faster than tensor by tensor. 8-bit AdamW and
Adafactor use statistics of whole tensors, so they step the tensors themselves, and so does every optimizer if a group
is not to be one vector: large tensors gain nothing, and what gets no gradient must not be stepped.
"""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.lr_scheduler import LambdaLR

from dreambooth.errors import UserError
from dreambooth.method import Group
from dreambooth.options.steps import OptimizerOptions
from dreambooth.options.training import TrainingConfig

logger = logging.getLogger(__name__)

ELEMENT_WISE = ("AdamW", "Prodigy", "ScheduleFreeAdamW")
MOMENTS = {"AdamW": 2, "Prodigy": 4, "ScheduleFreeAdamW": 2, "Adafactor": 0}  # numbers that are kept of each one
OPTIONS = ("initial_lr", "betas", "eps", "weight_decay")  # a group's settings, as opposed to its state


# ---- choosing an optimizer ----


def build_optimizer(groups: Sequence[Group], config: TrainingConfig, num_ranks: int) -> torch.optim.Optimizer:
    """Return the optimizer over groups of parameters, each with its learning rate and weight decay.

    The parameters must already be on their device, and stay there. Raises UserError as `check_optimizer` does.
    """
    optimizer_class, options = _choose(config)
    whole = all(group.flat for group in groups)
    if whole and not config.use_8bit_adam and config.optimizer_name() in ELEMENT_WISE:
        optimizer_class = _flat(optimizer_class)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * num_ranks
    scale = samples_per_step if config.scale_lr else 1
    if config.optimizer_name() == "Prodigy" and not 0.1 <= config.learning_rate <= 10:
        logger.warning(
            "--optimizer Prodigy finds the learning rate itself and multiplies it by --learning_rate, which is %g; "
            "it is meant to be about 1",
            config.learning_rate,
        )
    optimizer = optimizer_class(
        [
            {"params": group.parameters, "lr": group.learning_rate * scale, "weight_decay": group.weight_decay}
            for group in groups
        ],
        **options,
    )
    if _is_schedule_free(optimizer):
        optimizer.train()
    # Not every optimizer does: see `FlatGroups`, and 8-bit kernels write through pointers
    parameters = [parameter for group in groups for parameter in group.parameters]
    optimizer.register_step_post_hook(lambda *_: increment_version(parameters))
    return optimizer


def check_optimizer(config: OptimizerOptions) -> None:
    """Raise UserError, with the pip command, if the optimizer's package is not installed."""
    _choose(config)


def state_bytes(parameters: Sequence[nn.Parameter], config: OptimizerOptions) -> int:
    """Return about how many bytes an optimizer keeps of these parameters."""
    numbers, width = MOMENTS[config.optimizer_name()], 1 if config.use_8bit_adam else 4
    return sum(parameter.numel() for parameter in parameters) * numbers * width


def check_warmup(config: OptimizerOptions, total_steps: int) -> None:
    """Warn if the learning rate is still warming up when the run ends."""
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= total_steps:
        logger.warning(
            "--lr_warmup_steps %d: the run ends after %d steps, before it has reached --learning_rate %g",
            config.lr_warmup_steps,
            total_steps,
            config.learning_rate,
        )


def _choose(config: OptimizerOptions) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    name = config.optimizer_name()
    if config.use_8bit_adam:
        return _import("bitsandbytes", "optim", "AdamW8bit", "--use_8bit_adam"), adam
    if name == "Prodigy":
        prodigy = _import("prodigyopt", "prodigy", "Prodigy", "--optimizer Prodigy")
        return prodigy, {**adam, "use_bias_correction": True, "safeguard_warmup": True}
    if name == "ScheduleFreeAdamW":
        return _import("schedulefree", "", "AdamWScheduleFree", "--optimizer ScheduleFreeAdamW"), adam
    if name == "Adafactor":
        # Adafactor scales its steps with the parameters' RMS, but at least with eps[1]. B starts at 0 and would hardly
        # move; with eps[1] = 1 the step size is the learning rate, as with AdamW.
        return torch.optim.Adafactor, {"eps": (None, 1.0)}
    return torch.optim.AdamW, {**adam, "fused": True}


def _import(package: str, module: str, name: str, flag: str) -> type[torch.optim.Optimizer]:
    try:
        return getattr(importlib.import_module(f"{package}.{module}".rstrip(".")), name)
    except ImportError as error:
        raise UserError(f"{flag} needs a package that is not installed: pip install {package} ({error})") from error


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerOptions, total_steps: int) -> LambdaLR:
    """Return the learning-rate schedule, stepped once per optimizer step."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    optimizer_state: dict[str, Any],
    schedule_state: dict[str, Any],
) -> None:
    """Restore an optimizer and its schedule. Learning rates, betas and weight decay keep their present values."""
    options = [{name: group[name] for name in OPTIONS if name in group} for group in optimizer.param_groups]
    base_rates = lr_scheduler.base_lrs
    optimizer.load_state_dict(optimizer_state)
    for entry in optimizer.state.values():  # on the CPU an optimizer keeps what it is given, here parts of a file
        entry |= {name: value.clone() for name, value in entry.items() if isinstance(value, Tensor) and value.is_cpu}
    lr_scheduler.load_state_dict(schedule_state)
    lr_scheduler.base_lrs = base_rates
    rates = zip(base_rates, lr_scheduler.lr_lambdas)
    for group, given, (rate, factor) in zip(optimizer.param_groups, options, rates, strict=True):
        group.update(given, lr=rate * factor(lr_scheduler.last_epoch))


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside this context the parameters have the values to save and to draw samples with.

    A schedule-free optimizer trains at one point and keeps an average of the points; here the parameters are that
    average, and afterwards, bit for bit, what they were before. With other optimizers this does nothing. The optimizer
    may be in accelerate's wrapper.
    """
    if not _is_schedule_free(optimizer):
        yield
        return
    with restored(optimizer):
        optimizer.eval()
        _count_change(optimizer)
        try:
            yield
        finally:
            optimizer.train()


@contextmanager
def restored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After this context, what the optimizer steps has the values that it had before, bit for bit."""
    trained = [value.clone() for value in values_of(optimizer)]
    try:
        yield
    finally:
        set_values(optimizer, trained)


def values_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return what an optimizer steps: the vectors of its groups, or the parameters themselves. They are not copies."""
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


def set_values(optimizer: torch.optim.Optimizer, values: Sequence[Tensor]) -> None:
    """Set what an optimizer steps to values like those that `values_of` returns."""
    for own, value in zip(values_of(optimizer), values, strict=True):
        own.copy_(value)
    _count_change(optimizer)


def _count_change(optimizer: torch.optim.Optimizer) -> None:
    flat = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    if isinstance(flat, FlatGroups):
        flat.count_change()


class _ScheduleFree(torch.optim.Optimizer):
    """The interface of schedule-free optimizers, for type checkers: torch's, and two modes, as modules have."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> TypeGuard[_ScheduleFree]:
    return "train_mode" in optimizer.param_groups[0]


# ---- a group as one long vector ----


def _flat(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    return type(f"Flat{optimizer_class.__name__}", (FlatGroups, optimizer_class), {})


class FlatGroups(torch.optim.Optimizer):
    """A mixin that makes an elementwise optimizer step each group's parameters as one long vector.

    The parameters and their gradients become views of two buffers per group; names, shapes and values stay the same.
    State dicts hold an entry per parameter, as if the optimizer stepped the parameters one by one.

    Views made through .data do not share their buffer's version, by which others see that a tensor has changed: who
    writes into a buffer calls `count_change`.

    The views must stay in place. `step` raises RuntimeError if a parameter was moved to another device, or if a
    gradient was set to None instead of being zeroed by this class's `zero_grad`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options):
        self.parameters = [list(group["params"]) for group in groups]
        super().__init__([{**group, "params": [_flatten(group["params"])]} for group in groups], **options)
        self.places = [_places(parameter) for group in self.parameters for parameter in group]

    def step(self, closure=None):
        parameters = (parameter for group in self.parameters for parameter in group)
        if any(_places(parameter) != places for parameter, places in zip(parameters, self.places)):
            raise RuntimeError("a parameter or its gradient no longer lies in the optimizer's buffers")
        step: Any = super().step
        if getattr(step, "hooked", False):  # torch has run the hooks around this step, and would run them here again
            step = step.__wrapped__.__get__(self)
        return step(closure)

    def count_change(self) -> None:
        """Have the version of every parameter say that it has changed."""
        increment_version([parameter for group in self.parameters for parameter in group])

    def zero_grad(self) -> None:
        for group in self.param_groups:
            group["params"][0].grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        flat = super().state_dict()
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for index, (group, parameters) in enumerate(zip(flat["param_groups"], self.parameters)):
            numbers = list(range(len(state), len(state) + len(parameters)))
            groups.append({**group, "params": numbers})
            cut = {name: _cut(value, parameters) for name, value in flat["state"].get(index, {}).items()}
            state |= {number: {name: cut[name][i] for name in cut} for i, number in enumerate(numbers)}
        return {**flat, "state": {number: entry for number, entry in state.items() if entry}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != [len(parameters) for parameters in self.parameters]:
            raise ValueError(
                f"the state has groups of {sizes} parameters, these groups have {[*map(len, self.parameters)]}"
            )
        state, groups = {}, []
        for index, group in enumerate(state_dict["param_groups"]):
            groups.append({**group, "params": [index]})
            if entries := [state_dict["state"][number] for number in group["params"] if number in state_dict["state"]]:
                state[index] = {name: _join([entry[name] for entry in entries]) for name in entries[0]}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})


def _flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return one vector of all parameters, which become views of it; their gradients, zeros, are views of its own."""
    vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    vector.grad = torch.zeros_like(vector)
    values, gradients = _cut(vector.detach(), parameters), _cut(vector.grad, parameters)
    for parameter, value, gradient in zip(parameters, values, gradients):
        parameter.data, parameter.grad = value, gradient
    return vector


def _cut(value: Any, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """Return each parameter's piece of a vector. Anything else, such as a step count, is repeated for each."""
    if not isinstance(value, Tensor):
        return [value] * len(parameters)
    if value.dim() == 0:
        return [value.clone() for _ in parameters]
    pieces = value.split([parameter.numel() for parameter in parameters])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters)]


def _join(pieces: list[Any]) -> Any:
    """Return the vector made of pieces: the inverse of `_cut`."""
    if not isinstance(pieces[0], Tensor) or pieces[0].dim() == 0:
        return pieces[0]
    return torch.cat([piece.flatten() for piece in pieces])


def _places(parameter: nn.Parameter) -> tuple[int, int]:
    return parameter.data_ptr(), 0 if parameter.grad is None else parameter.grad.data_ptr()
