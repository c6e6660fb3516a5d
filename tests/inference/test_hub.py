"""Models of the Hugging Face Hub on a machine without a network."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from fastvit_train.data.sources import hub
from fastvit_train.inference.trained_model import load_run
from fastvit_train.models.pretrained.hub import needs_hub
from fastvit_train.utils.errors import UserError


@pytest.fixture(params=["refuses", "is silent"])
def unreachable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a host that refuses connections, or that accepts them and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if request.param == "refuses":
        listener.close()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "MAX_WAIT", 0.2)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    yield url
    listener.close()


@pytest.mark.parametrize("source", ["hf-hub:timm/vit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_an_unreachable_hub_is_reported_without_retries(unreachable: str, source: str) -> None:
    with pytest.raises(UserError) as error:
        load_run(source)
    message = str(error.value)
    assert message.startswith(
        f"{source} cannot be loaded: {unreachable} cannot be reached, and the model is not in the"
    )
    assert message.endswith("copy the folder, and give local-dir:FOLDER")
    assert not constants.HF_HUB_OFFLINE, "the client stays offline"


def test_only_models_of_the_hub_need_it() -> None:
    names = ("mc_vit_4_4_32", "local-dir:x", "nowhere", "hf-hub:", "vit_tiny_patch16_224.nonsense")
    assert [needs_hub(name) for name in names] == [False] * len(names)
