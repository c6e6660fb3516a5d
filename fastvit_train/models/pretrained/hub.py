"""Whether the Hugging Face Hub answers, so that a machine without a network does not wait for its client's retries."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import timm
from huggingface_hub import constants, utils
from huggingface_hub.utils import get_session

HUB = "hf-hub:"
MAX_WAIT = 5.0
"""seconds until the Hub counts as unreachable; its client would try again for a minute"""
NOT_AVAILABLE = (502, 503, 504)
"""HTTP statuses with which a gateway answers for a server that it does not reach"""


def needs_hub(source: str) -> bool:
    """Whether timm gets the weights of `source`, a name that `timm.create_model` takes, from the Hub."""
    if source.startswith(HUB):
        return source != HUB
    if not timm.is_model(source):
        return False
    try:
        cfg = timm.get_pretrained_cfg(source)
    except RuntimeError:  # there are no such weights of the model, which timm reports when it is built
        return False
    return cfg is not None and bool(cfg.hf_hub_id)


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Let the Hub's client use only its cache inside of the context if the Hub does not answer in a few seconds.

    Yields:
        Whether the Hub answers.
    """
    before, reachable = constants.HF_HUB_OFFLINE, not constants.HF_HUB_OFFLINE and _is_reachable()
    try:
        _set_offline(not reachable)
        yield reachable
    finally:
        _set_offline(before)


def _set_offline(offline: bool) -> None:
    constants.HF_HUB_OFFLINE = offline  # the client has no other switch for a part of a program
    if hasattr(utils, "reset_sessions"):  # before version 1.0 an open session keeps the setting that it began with
        utils.reset_sessions()


def unreachable_reason(source: str) -> str:
    """Say what to do about a model that is not in the cache if the Hub does not answer."""
    return (
        f"{constants.ENDPOINT} cannot be reached, and the model is not in the cache {constants.HF_HUB_CACHE}; "
        "check the network (HF_ENDPOINT names a mirror), or save the model on another machine with "
        f"`export {source} --to timm`, copy the folder, and give local-dir:FOLDER"
    )


def _is_reachable() -> bool:
    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=MAX_WAIT).status_code)
        except Exception:  # the exception's type depends on the HTTP library that huggingface_hub uses
            answers.append(NOT_AVAILABLE[0])

    thread = threading.Thread(target=ask, daemon=True)  # because no timeout covers the resolution of the host's name
    thread.start()
    thread.join(MAX_WAIT)
    return bool(answers) and answers[0] not in NOT_AVAILABLE
