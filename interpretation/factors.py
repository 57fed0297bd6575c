"""A and B as heat maps: which blocks of a layer's output are fed from which blocks of its input.

Row i of A feeds block i of the output, b1 features; column j reads block j of the input, b2 features. In q, k and v the
output is heads, one after the other, and in out the input is: where blocks and heads fit each other, heads are marked.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreambooth.report.figures import GREY, new_figure, rendered, style
from interpretation.measuring import Measured, Portrait
from kron_formats.changes import Factors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 8  # layers, those that change most
SHARP = 180  # dpi
HEADS = "#3fc5f0"


def strongest(portrait: Portrait) -> list[Measured]:
    """Return the layers with factors that change most, relative to their weights if these are known."""
    entries = [entry for entry in portrait.layers if isinstance(entry.change, Factors)]
    return sorted(entries, key=lambda entry: -(entry.relative or entry.spectrum.frobenius))[:SHOWN]


def draw_factors(entries: Sequence[Measured]) -> Image.Image:
    """Draw |A| above |B| of some layers, each from 0 to its own largest entry; blue lines are between heads."""
    figure = new_figure(180 * min(4, len(entries)) + 40, 400 * (1 + (len(entries) - 1) // 4), dpi=SHARP)
    columns, bands = min(4, len(entries)), 1 + (len(entries) - 1) // 4
    panels = figure.subplots(2 * bands, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for number, entry in enumerate(entries):
        band, column = divmod(number, columns)
        assert isinstance(entry.change, Factors)
        for down, side in enumerate("AB"):
            _draw_factor(panels[2 * band + down, column], entry, side, entry.place.title if side == "A" else "")
    return rendered(figure)


def _draw_factor(axes: "Axes", entry: Measured, side: str, title: str) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    factor: Any = getattr(entry.change, side).abs().numpy()
    axes.set_visible(True)
    style(axes, x_label=f"{side} {factor.shape}".replace("(", "").replace(")", "").replace(", ", " × "))
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    axes.grid(False)
    axes.imshow(factor, cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
    for axis, count in zip((axes.yaxis, axes.xaxis), factor.shape):
        axis.set_major_locator(FixedLocator([0]) if count == 1 else MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=7, colors=GREY)
    rows, columns = head_boundaries(entry)[side]
    for y in rows:
        axes.axhline(y - 0.5, color=HEADS, linewidth=0.9)
    for x in columns:
        axes.axvline(x - 0.5, color=HEADS, linewidth=0.9)


def head_boundaries(entry: Measured) -> dict[str, tuple[list[int], list[int]]]:
    """Return, for "A" and "B", before which rows and which columns another head begins.

    None where a block is not made of whole heads, nor a head of whole blocks; nor with rows in the order of the paper's
    code, where every row of A feeds every head.
    """
    change, place = entry.change, entry.place
    none: dict[str, tuple[list[int], list[int]]] = {"A": ([], []), "B": ([], [])}
    if not isinstance(change, Factors) or change.transposed_rows or not place.head_size:
        return none
    side = 1 if place.projection == "out" else 0  # whether heads are the input or the output
    in_a, in_b = boundaries(change.A.shape[side], change.B.shape[side], place.head_size)
    return {"A": ([], in_a), "B": ([], in_b)} if side else {"A": (in_a, []), "B": (in_b, [])}


def boundaries(blocks: int, block: int, head: int) -> tuple[list[int], list[int]]:
    """Return before which of the `blocks`, and before which feature of a block, another head begins.

    `block` and `head` are features. Each block is whole heads, or each head is whole blocks; else none is marked.
    """
    if block % head == 0:
        return [*range(1, blocks)], [*range(head, block, head)]
    if head % block == 0:
        return [*range(head // block, blocks, head // block)], []
    return [], []


def head_words(entry: Measured) -> str:
    """Return how the blocks of A and the heads of its layer fit each other, in words; "" in no attention."""
    change, place = entry.change, entry.place
    if not isinstance(change, Factors) or not place.head_size:
        return ""
    side = 1 if place.projection == "out" else 0
    block, head, name = change.B.shape[side], place.head_size, ("row", "column")[side]
    if change.transposed_rows and not side:
        return "every row of A feeds every head, since the rows are in the order of the paper's code"
    if block % head == 0:
        return f"a {name} of A is {block // head} whole heads" if block > head else f"a {name} of A is a head"
    if head % block == 0:
        return f"{head // block} {name}s of A are a head"
    return f"a {name} of A is {block / head:.3g} heads: they do not fit each other"
