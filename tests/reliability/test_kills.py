"""Killed anywhere and resumed, a run ends as if nothing had happened: bit for bit, nothing seen twice or left out."""

from typing import Any

import pytest
from victims import Victim, outcome

KILLED = -9


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    """How many processes, and what a run of them comes to that nothing happens to."""
    victim = Victim(tmp_path_factory.mktemp("runs"), "undisturbed", processes=request.param)
    assert victim.wait() == [0] * request.param, victim.log.read_text()
    assert victim.has(f"world size {request.param}")
    return request.param, outcome(victim.folder)
