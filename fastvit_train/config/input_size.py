"""The size of a model's input."""

import math
from typing import NamedTuple, Self


class InputSize(NamedTuple):
    """Channels, and height and width in pixels, of the images that a model takes; one channel holds gray levels."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, channels: int, image_size: str | int) -> Self:
        """Return the size that the settings `in_chans` and `image_size` describe: a side, or HEIGHTxWIDTH."""
        height, _, width = str(image_size).partition("x")
        return cls(channels, int(height), int(width or height))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def image_size(self) -> str | int:
        """Height and width as the setting `image_size` holds them."""
        return self.height if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def nbytes(self) -> int:
        """Bytes of an image as uint8."""
        return math.prod(self)

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"
