"""How images are resized, as timm describes it."""

import pytest

from fastvit_train.data.rendering import Rendering


@pytest.mark.parametrize("rendering", [Rendering(), Rendering(fit="stretch"), Rendering(fit="pad", crop_pct=0.9)])
def test_timms_entries_are_read_as_they_are_written(rendering: Rendering) -> None:
    assert Rendering.of_timm(rendering.timm_entries()) == rendering
