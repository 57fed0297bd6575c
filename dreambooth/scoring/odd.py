"""The odd one out among a few values: one that is far above the others, as these differ among themselves."""

import math
from collections.abc import Sequence

import numpy as np

CHANCE = 0.02  # of an odd one where there is none, if the values are normally distributed
LEAST = 0.02  # above the mean of the others; less is not worth a look


def odd_one(values: Sequence[float]) -> int | None:
    """Return which of the values is far above the others; None if the largest is not, or there are fewer than three.

    This is Grubbs's test, one-sided: the distance of the largest value from the mean of the others, in standard errors
    of that difference, against Student's t with n - 2 degrees of freedom. Several odd ones hide each other.
    """
    number = len(values)
    if number < 3:
        return None
    largest = int(np.argmax(values))
    others = np.delete(np.asarray(values, float), largest)
    distance, spread = values[largest] - others.mean(), others.std(ddof=1) * math.sqrt(1 + 1 / len(others))
    if not distance >= LEAST:
        return None
    chance = number * student_tail(distance / spread, number - 2) if spread > 0 else 0.0
    return largest if chance <= CHANCE else None


def student_tail(t: float, freedom: int) -> float:
    """Return the probability that Student's t with so many degrees of freedom is above t >= 0.

    With t = √freedom · tan(angle), its density is proportional to cos(angle) to the power freedom - 1.
    """

    def below_right_angle(first: float) -> float:
        angles = np.linspace(first, math.pi / 2, 2001)
        return float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles))

    return below_right_angle(math.atan(t / math.sqrt(freedom))) / (2 * below_right_angle(0.0))
