"""KL and learning-rate schedules, and the config sections that choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from raytrain.config.models import require
from raytrain.config.plugins import load_plugins


@dataclass(frozen=True)
class ObjectiveConfig:
    """J = reconstruction + weight(step) * KL + alpha * auxiliary reconstruction."""

    annealing: str = "linear"
    """Shape of the KL weight over the steps: constant, linear, sigmoid, cyclical, or a schedule of a plugin."""
    start: float = 0.01
    """Start of annealing, as a fraction of the steps."""
    end: float = 0.08
    """End of annealing, as a fraction of the steps."""
    cycles: int = 4
    """Cycles of the cyclical schedule between start and end; each rises over its first half."""
    weight: float = 1.0
    """KL weight after annealing (throughout, for ``constant``)."""
    floor: float = 0.001
    """Least KL weight during annealing, as in the code of Semeniuta et al. 2017; never above ``weight``."""
    free_bits: float = 0.0
    """Nats per sample of KL that cost nothing, shared equally by the latent dimensions."""
    target_kl: float = 0.0
    """If above 0, the KL term is |KL - target_kl| instead of KL, in nats per sample."""
    rate: float = 0.0
    """If above 0, a Lagrange multiplier holds the mean KL at this many nats per sample or more (Pelsmaeker and Aziz
    2020); meant for constant annealing."""
    alpha: float = 0.2
    """Weight of the auxiliary reconstruction (hybrid only)."""
    alpha_end: float = 0.0
    """Fraction of the steps at which the weight alpha, falling evenly from the first step, is 0; 0 keeps it."""
    input_dropout: float = 0.0
    """Probability that the dummy symbol replaces an input byte of the decoder."""

    def __post_init__(self) -> None:
        if self.annealing not in KL_SCHEDULES:
            load_plugins()
        known = ", ".join(KL_SCHEDULES)
        require(self.annealing in KL_SCHEDULES, "objective.annealing", self.annealing, f"must be one of {known}")
        require(0 <= self.start <= 1, "objective.start", self.start, "a fraction of the steps, in [0, 1]")
        require(self.start <= self.end <= 1, "objective.end", self.end, "must be in [objective.start, 1]")
        require(self.cycles > 0, "objective.cycles", self.cycles, "must be positive")
        require(self.weight >= 0, "objective.weight", self.weight, "must not be negative")
        require(self.floor >= 0, "objective.floor", self.floor, "must not be negative")
        require(self.free_bits >= 0, "objective.free_bits", self.free_bits, "must not be negative")
        require(self.target_kl >= 0, "objective.target_kl", self.target_kl, "must not be negative")
        require(self.rate >= 0, "objective.rate", self.rate, "must not be negative")
        for first, second in combinations(("free_bits", "target_kl", "rate"), 2):
            require(
                getattr(self, first) == 0 or getattr(self, second) == 0,
                f"objective.{first}",
                getattr(self, first),
                f"cannot be combined with objective.{second}; set one of them to 0",
            )
        require(self.alpha >= 0, "objective.alpha", self.alpha, "must not be negative")
        require(0 <= self.alpha_end <= 1, "objective.alpha_end", self.alpha_end, "a fraction of the steps, in [0, 1]")
        require(0 <= self.input_dropout <= 1, "objective.input_dropout", self.input_dropout, "must be in [0, 1]")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), with a schedule, clipping and a moving average of the weights."""

    learning_rate: float = 1e-3
    """Learning rate after the warm-up and before any decay."""
    schedule: str = "exponential"
    """Shape of the learning rate: exponential (the paper's), constant, linear, cosine, or a schedule of a plugin."""
    warmup: float = 0.0
    """Warm-up: fraction of the steps over which the learning rate rises evenly to its value; 0 has none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    decay: float = 0.95
    """Factor of the exponential schedule at every hundredth of the steps after ``decay_start``."""
    decay_start: float = 0.2
    """Start of the exponential schedule's decay, as a fraction of the steps."""
    weight_decay: float = 0.0
    """Each step multiplies weight matrices and convolution kernels by 1 - learning rate * ``weight_decay``."""
    clip: float = 10.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of a moving average of the weights: it is what is evaluated, sampled and served; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.schedule not in LEARNING_RATE_SCHEDULES:
            load_plugins()
        known = ", ".join(LEARNING_RATE_SCHEDULES)
        require(
            self.schedule in LEARNING_RATE_SCHEDULES, "optimizer.schedule", self.schedule, f"must be one of {known}"
        )
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        require(0 <= self.warmup < 1, "optimizer.warmup", self.warmup, "a fraction of the steps, in [0, 1)")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
        require(0 < self.decay <= 1, "optimizer.decay", self.decay, "must be in (0, 1]")
        require(0 <= self.decay_start <= 1, "optimizer.decay_start", self.decay_start, "must be in [0, 1]")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must not be negative")
        require(self.clip >= 0, "optimizer.clip", self.clip, "must not be negative")
        require(0 <= self.ema < 1, "optimizer.ema", self.ema, "must be in [0, 1)")


# -------------------------------------------------------------------------------------------- KL weight


def constant(progress: float, config: ObjectiveConfig) -> float:
    """Return 1: there is no annealing."""
    return 1.0


def linear(progress: float, config: ObjectiveConfig) -> float:
    """Rise linearly from start to end."""
    return progress


def sigmoid(progress: float, config: ObjectiveConfig) -> float:
    """Rise like the tanh of Bowman et al. (2016), over 3.5 of its widths to either side of the midpoint."""
    # theirs is (tanh((step - 3500) / 1000) + 1) / 2
    return (math.tanh(7 * progress - 3.5) + 1) / 2


def cyclical(progress: float, config: ObjectiveConfig) -> float:
    """Rise over the first half of each cycle and stay at the top over the second (Fu et al. 2019)."""
    return min(1.0, 2 * (progress * config.cycles % 1.0))


KL_SCHEDULES: dict[str, Callable[[float, ObjectiveConfig], float]] = {
    "constant": constant,
    "linear": linear,
    "sigmoid": sigmoid,
    "cyclical": cyclical,
}
"""Shape of the KL weight between start and end of annealing: progress in [0, 1] -> share of ``weight`` in [0, 1].

The names are the values of ``objective.annealing``. Plugins add theirs.
"""


def kl_weight(config: ObjectiveConfig, step: int, steps: int) -> float:
    """Return the weight of the KL term at ``step`` of ``steps``.

    Every schedule except ``constant`` equals ``config.floor`` up to the start and ``config.weight`` from the end on. In
    between it never falls below the floor. If ``config.weight`` is below ``config.floor``, the floor is the former.
    """
    start, end = config.start * steps, config.end * steps
    if config.annealing == "constant" or step >= end:
        return config.weight
    floor = min(config.floor, config.weight)
    if step <= start:
        return floor
    if config.annealing not in KL_SCHEDULES:
        load_plugins()  # an unpickled config has not been validated in this process
    return max(floor, config.weight * KL_SCHEDULES[config.annealing]((step - start) / (end - start), config))


def annealing_end(config: ObjectiveConfig, steps: int) -> int:
    """Return the first step from which the KL weight no longer changes; 0 for a constant weight."""
    return 0 if config.annealing == "constant" else math.ceil(config.end * steps)


def auxiliary_weight(config: ObjectiveConfig, step: int, steps: int) -> float:
    """Return the weight of the auxiliary reconstruction at ``step`` of ``steps``, in [0, config.alpha]."""
    if config.alpha_end == 0:
        return config.alpha
    return config.alpha * max(0.0, 1 - step / (config.alpha_end * steps))


# ---------------------------------------------------------------------------------------- learning rate


def exponential_decay(progress: float, config: OptimizerConfig) -> float:
    """Return the paper's decay, with a hundredth of the steps in place of an epoch.

    The learning rate is multiplied by ``config.decay`` at each hundredth after ``config.decay_start``.
    """
    # the small number keeps a step at a whole hundredth from being rounded down
    hundredths = math.floor(100 * (progress - config.decay_start) + 1e-9)
    return config.decay ** max(0, hundredths)


def no_decay(progress: float, config: OptimizerConfig) -> float:
    """Return 1: there is no decay."""
    return 1.0


def linear_decay(progress: float, config: OptimizerConfig) -> float:
    """Fall linearly from the end of the warm-up to 0 at the end of the run."""
    return (1 - progress) / (1 - config.warmup)


def cosine_decay(progress: float, config: OptimizerConfig) -> float:
    """Fall along half a cosine from the end of the warm-up to 0 at the end of the run (Loshchilov & Hutter 2017)."""
    return (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup))) / 2


LEARNING_RATE_SCHEDULES: dict[str, Callable[[float, OptimizerConfig], float]] = {
    "exponential": exponential_decay,
    "constant": no_decay,
    "linear": linear_decay,
    "cosine": cosine_decay,
}
"""Shape of the learning rate after the warm-up: fraction of the steps in [warmup, 1] -> share of ``learning_rate``.

The names are the values of ``optimizer.schedule``. Plugins add theirs.
"""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate at ``step`` of ``steps``.

    It rises linearly during the warm-up, starting above 0, and then follows the schedule.
    """
    if config.schedule not in LEARNING_RATE_SCHEDULES:
        load_plugins()  # an unpickled config has not been validated in this process
    warming = config.warmup * steps
    risen = (step + 1) / warming if step + 1 < warming else 1.0
    share = LEARNING_RATE_SCHEDULES[config.schedule](max(step / steps, config.warmup), config)
    return config.learning_rate * risen * share


def average_decay(config: OptimizerConfig, step: int) -> float:
    """Return the decay of the moving average of the weights at ``step``: less than ``config.ema`` at first.

    The average thus forgets the initial weights at once, and its memory grows as the run goes on.
    """
    return min(config.ema, (1 + step) / (10 + step))
