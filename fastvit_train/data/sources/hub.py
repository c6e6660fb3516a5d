"""Whether the Hugging Face Hub answers, so that a machine without a network does not wait for its client's retries."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, utils
from huggingface_hub.utils import get_session

MAX_WAIT = 5.0
"""seconds until the Hub counts as unreachable; its client would try again for a minute"""
NOT_AVAILABLE = (502, 503, 504)
"""HTTP statuses with which a gateway answers for a server that it does not reach"""


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
