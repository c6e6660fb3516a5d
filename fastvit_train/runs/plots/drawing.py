"""Parts of all pictures: names as matplotlib shows them unchanged, and writing the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastvit_train.runs.plots.fonts import drawable, set_fonts
from fastvit_train.utils.errors import UserError, printable


def save_figure(figure: Figure, output: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        UserError: if it cannot be written.
    """
    set_fonts(figure)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the figure {output} cannot be written ({error}); give another --output, such as curves.png"
        ) from None


def in_color(image: Tensor) -> Tensor:
    """Return an image, (1 or 3, height, width), in red, green and blue; matplotlib would color one channel."""
    return image.expand(3, -1, -1)


def add_legend(axes: Axes, handles: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """Add a legend without a frame.

    The names are set afterwards, because matplotlib leaves out those that begin with an underscore and warns.
    """
    legend = axes.legend(handles, [str(number) for number in range(len(names))], frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(escape_mathtext(name))


def escape_mathtext(text: str) -> str:
    """Return `text` escaped, so that matplotlib shows it unchanged: a dollar sign would start a formula.

    Letters that no font on the machine has are replaced by their codes.
    """
    return drawable(printable(text)).replace("$", r"\$")
