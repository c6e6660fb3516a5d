"""Parts of all pictures: names as matplotlib shows them unchanged, and writing the file."""

from pathlib import Path

from matplotlib.figure import Figure

from fastvit_train.utils.errors import UserError, printable


def save_figure(figure: Figure, output: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the figure {output} cannot be written ({error}); give another --output, such as curves.png"
        ) from None


def escape_mathtext(text: str) -> str:
    """Return `text` escaped, so that matplotlib shows it unchanged: a dollar sign would start a formula."""
    return printable(text).replace("$", r"\$")
