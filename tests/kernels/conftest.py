"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest

from fastvit_kernels.autotune import chooser


@pytest.fixture(autouse=True)
def _forget_choices() -> Iterator[None]:
    """Let each test start without what `auto` has measured in this process."""
    chooser._choices.clear()
    yield
    chooser._choices.clear()
