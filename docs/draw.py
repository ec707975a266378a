"""Draw `engines.svg`, the picture of docs/engines.md: `python docs/draw.py`.

The picture shows how the two engines turn logits, or hidden states, into a loss and its gradient. It is committed
beside this file.
"""

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DATA, KERNEL, GEMM = "#eef2f7", "#cfe3f7", "#fbe0c3"
# size of every box, in units of the axes
WIDTH, HEIGHT = 2.3, 0.72
# boxes: (left edge x, centre y, text, colour)
LOGITS = [
    (0, 3, "logits [B, T, V]\nlabels [B, T]", DATA),
    (3, 3, "row kernel\neach logit read once", KERNEL),
    (6, 3, "sequence kernel\nsums in float64", KERNEL),
    (9, 3, "loss kernel\nd loss / d log-prob", KERNEL),
    (9, 2, "loss, metrics", DATA),
    (6, 2, "sequence kernel\ngradient of each token", KERNEL),
    (3, 2, "row kernel\none read, one write", KERNEL),
    (0, 2, "gradient [B, T, V]", DATA),
]
HIDDEN = [
    (0, 0.6, "chunk of completion\ntokens [n, H]", DATA),
    (3, 0.6, "GEMM\nfloat32 logits", GEMM),
    (6, 0.6, "row kernels\nlog-probabilities", KERNEL),
    (9, 0.6, "loss kernel\nloss, d loss / d log-prob", KERNEL),
    (9, -0.4, "logits become\ntheir own gradient", KERNEL),
    (6, -0.4, "2 GEMMs", GEMM),
    (3, -0.4, "d hidden [n, H]; sum of\nd weight [V, H] in float32", DATA),
    (0, -0.4, "next chunk", DATA),
]


def boxes(axes, drawn: list[tuple], arrows: list[tuple[int, int]]) -> None:
    """Draw boxes, and arrows given as pairs of box numbers."""
    for x, y, text, color in drawn:
        corner = (x, y - HEIGHT / 2)
        axes.add_patch(
            FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="#44546a")
        )
        axes.text(x + WIDTH / 2, y, text, ha="center", va="center", fontsize=9)
    for start, end in arrows:
        (x0, y0), (x1, y1) = drawn[start][:2], drawn[end][:2]
        if y0 == y1:
            here, there = (x0 + WIDTH * (x1 > x0), y0), (x1 + WIDTH * (x1 < x0), y1)
        else:
            half = HEIGHT / 2 if y1 > y0 else -HEIGHT / 2
            here, there = (x0 + WIDTH / 2, y0 + half), (x1 + WIDTH / 2, y1 - half)
        axes.add_patch(FancyArrowPatch(here, there, arrowstyle="-|>", mutation_scale=12, color="#44546a", lw=1.2))


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "kto-fused", "svg.fonttype": "none"})  # always the same file
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.2, 11.6), ylim=(-1.0, 4.0))
    axes.axis("off")
    axes.text(0, 3.62, "From logits: forward, then backward", fontsize=11, weight="bold")
    axes.text(0, 1.22, "From hidden states: one chunk of completion tokens at a time", fontsize=11, weight="bold")
    boxes(axes, LOGITS, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)])
    boxes(axes, HIDDEN, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 0)])
    FigureCanvasSVG(figure).print_svg(Path(__file__).with_name("engines.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
