"""A size of A as it is asked for: a number, or a fraction of a side of the layer.

    a1 = 4          the same in every layer; b1 = d_out/4
    a1 = d_out/8    an eighth of the layer's output features; b1 = 8
    a2 = d_in       all of its input features; b2 = 1

So a fraction of a side gives the size of B, the same in every layer. Importing this imports no torch.
"""

import re

from kron_formats.errors import KroneckerError

FactorSize = int | str
SIDES = {"a1": ("d_out", "b1"), "a2": ("d_in", "b2")}  # what each size of A divides, and what is left for B


def as_size(text: int | str) -> FactorSize:
    """Return a number for the text of one; anything else as it is."""
    return int(text) if isinstance(text, str) and re.fullmatch(r"-?[0-9]{1,18}", text.strip()) else text


def fixed_size(factor: str, size: FactorSize) -> tuple[str, int]:
    """Return which size is the same in every layer, and that size: ("a1", 4) for 4, ("b1", 8) for d_out/8.

    Raises KroneckerError, with what to write, if `size` is neither a number nor a fraction of the side of `factor`.
    """
    side, rest = SIDES[factor]
    size = as_size(size)
    if not isinstance(size, str):
        return factor, size
    fraction = re.fullmatch(rf"{side}(?: */ *([1-9][0-9]{{0,8}}))?", size.strip())
    if not fraction:
        raise KroneckerError(
            f"{size} is not a size for {factor}, which divides {side}: write a number, {side}, or a fraction such as "
            f"{side}/8"
        )
    return rest, int(fraction[1] or 1)


def check_size(factor: str, size: FactorSize) -> None:
    """Raise KroneckerError, with what to write, unless `size` is a number of 1 or more, or a fraction of the side."""
    if fixed_size(factor, size)[1] < 1:
        raise KroneckerError(f"{size} is not 1 or more")


def size_in_layer(factor: str, size: FactorSize, features: int) -> int:
    """Return a size of A in a layer with so many features on its side.

    Raises KroneckerError, with values that divide, if the size does not divide them; and as `fixed_size` does.
    """
    fixed, number = fixed_size(factor, size)
    if number < 1 or features % number:
        divisors = [d for d in range(1, features + 1) if features % d == 0]
        nearest = [d for d in divisors if d < number][-1:] + [d for d in divisors if d > number][:1]
        given = f"{fixed} = {number}" + (f" ({factor} = {size})" if fixed != factor else "")
        raise KroneckerError(
            f"{given} does not divide {SIDES[factor][0]} = {features} "
            f"(nearest that do: {' and '.join(map(str, nearest))})"
        )
    return number if fixed == factor else features // number
