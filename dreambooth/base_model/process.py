"""What noise is: how latents are noised, what the denoiser then gets, and what it should predict."""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.options.steps import LossOptions

S = TypeVar("S", bound=ConfigMixin)

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


@dataclass(frozen=True)
class Noised:
    """A training example of the denoiser. All but `timesteps` are (rows, channels, height, width)."""

    latents: Tensor  # input
    timesteps: Tensor  # (rows,), as the denoiser takes them
    target: Tensor  # what the output should be


class NoiseProcess(Protocol):
    """Noise levels, and what to predict at them. Timesteps are 0 ... num_timesteps - 1; 0 has the least noise."""

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps."""
        ...

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Return the example from latents and noise (rows, channels, height, width) at timesteps (rows,)."""
        ...

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR weights (rows,) of losses at timesteps (rows,) (arXiv 2303.09556)."""
        ...


@dataclass(frozen=True)
class DiscreteProcess:
    """A fixed list of noise levels, DDPM's betas. The denoiser predicts the noise (epsilon) or the velocity (v)."""

    scheduler: DDPMScheduler

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config["num_train_timesteps"]

    @property
    def predicts_velocity(self) -> bool:
        """Whether the target is the velocity, not the noise."""
        return self.scheduler.config["prediction_type"] == "v_prediction"

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        index = cast(torch.IntTensor, timesteps)  # diffusers' annotation, which int64 does not satisfy
        noisy_latents = self.scheduler.add_noise(latents, noise, index)
        target = self.scheduler.get_velocity(latents, noise, index) if self.predicts_velocity else noise
        return Noised(noisy_latents, timesteps, target)

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v."""
        alphas_cumprod = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        if self.predicts_velocity:
            return snr.clamp(max=gamma) / (snr + 1)
        return gamma / snr.clamp(min=gamma)  # equals min(SNR, γ) / SNR, but is 1 instead of 0/0 if SNR is 0


@dataclass(frozen=True)
class EdmProcess:
    """Karras et al. (arXiv 2206.00364), eq. 7 and 8:  D = c_skip x + c_out F.

    F is the network's output. Their loss is the squared error of F with target (latents - c_skip x) / c_out.
    """

    scheduler: EDMEulerScheduler

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config["num_train_timesteps"]

    def noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        scheduler = self.scheduler
        scheduler.sigmas = scheduler.sigmas.to(timesteps.device)  # the scheduler keeps them on the CPU
        index = self.num_timesteps - 1 - timesteps  # sigmas go from high to low
        sigma = scheduler.sigmas[index].to(latents)[:, None, None, None]
        noisy_latents = latents + sigma * noise
        skipped = scheduler.precondition_outputs(noisy_latents, torch.zeros_like(noise), sigma)
        c_out = scheduler.precondition_outputs(torch.zeros_like(noise), torch.ones_like(noise), sigma)
        inputs = scheduler.precondition_inputs(noisy_latents, sigma)
        return Noised(inputs, scheduler.precondition_noise(sigma.flatten()), (latents - skipped) / c_out)

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise NotImplementedError("min-SNR weights are only defined for discrete timesteps")


def noise_process(scheduler: ConfigMixin, config: LossOptions) -> NoiseProcess:
    """Return the noise process that a base model was trained with, given the scheduler that it ships with.

    Raises UserError if this kind of noise or the prediction type is not supported, or an option conflicts with it.
    """
    process = _discrete_or_edm(scheduler)
    kind, last = scheduler.config.get("prediction_type", "epsilon"), process.num_timesteps - 1
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base model's scheduler has prediction_type {kind!r}; only epsilon and v_prediction are supported"
        )
    if _is_edm(scheduler) and (config.snr_gamma is not None or config.loss_type == "huber"):
        raise UserError("--snr_gamma and --loss_type huber need a base model with discrete timesteps; this one is EDM")
    if not config.min_timestep <= config.highest_timestep(process.num_timesteps) <= last:
        raise UserError(
            f"--min_timestep {config.min_timestep} --max_timestep {config.max_timestep}: the base model's timesteps go "
            f"from 0 to {last}"
        )
    return process


def with_noise(scheduler: Any, prediction_type: str | None, zero_terminal_snr: bool) -> Any:
    """Return a scheduler of a model that predicts something else, or whose last timestep is pure noise.

    None and False leave what its configuration says. Raises UserError if its kind of noise has no such choice.
    """
    changes: dict[str, Any] = {}
    if prediction_type is not None and prediction_type != scheduler.config.get("prediction_type"):
        changes["prediction_type"] = prediction_type
    if zero_terminal_snr and not scheduler.config.get("rescale_betas_zero_snr"):
        # Images then begin at the last timestep, pure noise, as they do in training
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    predicts = changes.get("prediction_type", scheduler.config.get("prediction_type", "epsilon"))
    if zero_terminal_snr and _is_edm(scheduler):
        raise UserError("--rescale_betas_zero_snr: the base model's noise is EDM's, which has no betas to rescale")
    if zero_terminal_snr and predicts == "epsilon":
        raise UserError(
            "zero terminal SNR (--rescale_betas_zero_snr) needs --prediction_type v_prediction: at the last timestep "
            "the latents are pure noise, and predicting that noise teaches nothing"
        )
    if not changes:
        return scheduler
    can_rescale = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
    kind = type(scheduler) if can_rescale or not zero_terminal_snr else DDIMScheduler
    return kind.from_config({**scheduler.config, **changes})


def noise_metadata(scheduler: ConfigMixin) -> dict[str, str]:
    """Return what the metadata of an adapter say about its base model's noise, in the words of other tools."""
    if _is_edm(scheduler):
        return {}
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}[scheduler.config.get("prediction_type", "epsilon")]
    zero_snr = bool(scheduler.config.get("rescale_betas_zero_snr"))
    return {"modelspec.prediction_type": predicts, "ss_zero_terminal_snr": str(zero_snr)}


def build_sampler(scheduler: S) -> S | DPMSolverMultistepScheduler:
    """Return a fast solver for drawing, or the base model's own scheduler if it needs a special one."""
    special = _is_edm(scheduler) or scheduler.config.get("rescale_betas_zero_snr")
    return scheduler if special else _convert(scheduler, DPMSolverMultistepScheduler)


def _discrete_or_edm(scheduler: ConfigMixin) -> DiscreteProcess | EdmProcess:
    if _is_edm(scheduler):
        return EdmProcess(_convert(scheduler, EDMEulerScheduler))
    if "beta_schedule" in scheduler.config:
        return DiscreteProcess(_convert(scheduler, DDPMScheduler))
    raise UserError(
        f"the base model's scheduler is a {type(scheduler).__name__}; only models with discrete betas, or with EDM's "
        "noise, can be trained"
    )


def _is_edm(scheduler: ConfigMixin) -> bool:
    """Whether a scheduler's noise is EDM's."""
    return type(scheduler).__name__ in EDM


def _convert(scheduler: ConfigMixin, kind: type[S]) -> S:
    """Return a scheduler of another class with the same configuration."""
    return cast(S, kind.from_config(scheduler.config))  # it returns a tuple only if asked for unused arguments
