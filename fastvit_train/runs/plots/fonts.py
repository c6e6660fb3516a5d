"""Fonts for names: matplotlib's own lacks the letters of many scripts, which other fonts on the machine may have."""

import functools
import logging
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

BOXES = "lastresort"
"""in the names of fonts that have a box for every letter"""
log = logging.getLogger(__name__)


def drawable(text: str) -> str:
    """Return a line of text with the codes of the letters that no font on the machine has, such as \\u732b."""
    letters = {letter: letter for letter in text}
    for letter in letters:
        if not _is_in_default_font(letter) and _family_with(letter) is None:
            _warn_of_missing_letters()
            letters[letter] = letter.encode("unicode_escape").decode()
    return "".join(letters[letter] for letter in text)


def set_fonts(figure: Figure) -> None:
    """Let each text of the figure take the letters that matplotlib's font lacks from another font of the machine."""
    for text in figure.findobj(Text):
        others = [_family_with(letter) for letter in text.get_text() if not _is_in_default_font(letter)]
        families = [family for family in dict.fromkeys(others) if family is not None]
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])


def _is_in_default_font(letter: str) -> bool:
    return letter == "\n" or ord(letter) in _letters(font_manager.findfont(font_manager.FontProperties()))


@functools.cache
def _family_with(letter: str) -> str | None:
    """Return the family of a font that can draw the letter, known to matplotlib from now on; None if there is none."""
    for path in _system_fonts():
        if ord(letter) in _letters(path):
            font_manager.fontManager.addfont(path)
            family = str(font_manager.get_font(path).family_name)
            found = font_manager.findfont(font_manager.FontProperties(family=[family]))
            if ord(letter) in _letters(found):  # not so if only the bold font of the family has it
                return family
    return None


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    """Return the files of the fonts on the machine, regular ones first."""
    files = [path for path in font_manager.findSystemFonts() if BOXES not in Path(path).stem.lower()]
    return tuple(sorted(files, key=lambda path: ("regular" not in Path(path).stem.lower(), path)))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Return the code points that a font can draw; none if matplotlib cannot use it, such as one of color bitmaps."""
    try:
        font = font_manager.get_font(path)
        letters = frozenset(font.get_charmap())
        font.set_size(10, 72)
        font.load_char(max(letters))
    except Exception:  # matplotlib raises many kinds of errors for fonts that are damaged or of an unusual kind
        return frozenset()
    return letters


@functools.cache
def _warn_of_missing_letters() -> None:
    """Warn once per process."""
    log.warning(
        "no font on this machine has some letters of the names in the pictures, so that their codes are drawn, such as "
        "\\u732b; install a font that has them, such as Noto Sans CJK"
    )
