"""Push trained models to the Hugging Face Hub: the verb `push`.

All files are written to a local folder before any is sent.
"""

import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastvit_train import __version__
from fastvit_train.config import settings_file
from fastvit_train.inference.export import write_verified
from fastvit_train.inference.model_card import model_card, without_paths
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.runs.results import is_finished, read_results
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, printable

RUN_FILES = ("summary.json", "metrics.jsonl", "curves.png")
"""files of a run that are pushed with its model and settings"""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that has write access"
HINTS = {
    401: f"the token is not valid; {LOGIN}",
    403: f"the token has no write access to it; {LOGIN} to that account",
    404: f"it does not exist, or the token has no access to it; {LOGIN}",
    409: "another commit is in progress; push again",
}


def push_run(
    run: str,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    checkpoint: str | None = None,
) -> str:
    """Push a trained model to the Hub, in timm's format, with a model card and its run's files.

    Args:
        run: as in `load_run`.
        repo: USER/NAME; it is created if it does not exist.
        public: make a new repository public. An existing public repository is pushed to only if this is set.
        dry_run: write the files to hub/ in the run's folder, and send nothing.
        license: the Hub's identifier of a license, such as apache-2.0, for the model card; by default it has none.
        checkpoint: as in `load_run`.

    Returns:
        The URL of the model, or the folder of a dry run.

    Raises:
        UserError: if the model is not available, if a name is not valid, or if the Hub cannot be reached or rejects it.
    """
    _check_names(repo, license)
    token = None if dry_run else get_token()
    if not dry_run and token is None:
        raise UserError(f"the Hugging Face Hub needs a token: {LOGIN}")
    loaded = load_run(run, device="cpu", checkpoint=checkpoint)
    _check_finished(loaded)
    loaded.print_checkpoint()
    if dry_run:
        folder = loaded.output_folder("hub")
        with atomic_io.as_save_error(f"{folder} cannot be written"), atomic_io.staged(folder) as partial:
            _write(loaded, repo, license, partial)
        print(f"written to {printable(str(folder))}; nothing was sent")
        return str(folder)
    with tempfile.TemporaryDirectory() as temporary:
        with atomic_io.as_save_error(f"{temporary} cannot be written"):
            _write(loaded, repo, license, Path(temporary) / "hub")
        url, visibility = _send(Path(temporary) / "hub", repo, public, token)
    print(f"pushed to {printable(url)} ({visibility})")
    return url


def _check_names(repo: str, license: str | None) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(str(error)) from None
    if "/" not in repo:
        raise UserError(f"{repo} is not of the form USER/NAME; USER is your name on the Hub or that of an organization")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,50}", license):
        raise UserError(
            f"--license {license!r} is not a license identifier of the Hub; examples: apache-2.0, cc-by-4.0"
        )


def _check_finished(run: TrainedModel) -> None:
    """Raise UserError if the weights are those of an earlier end of a run that goes on."""
    if run.folder is None or run.config is None or run.checkpoint is not None:
        return
    if not is_finished(read_results(run.folder)):
        raise UserError(
            f"{run.source} has trained on since its final weights were written; wait until it is finished, or push the "
            "weights so far with --checkpoint best or last"
        )


def _write(run: TrainedModel, repo: str, license: str | None, folder: Path) -> None:
    write_verified(run, "timm", folder)
    atomic_io.write_atomically(folder / "README.md", model_card(run, repo, license))
    if run.folder is None or run.config is None:
        return
    atomic_io.write_atomically(folder / "config.yaml", settings_file.to_file(without_paths(run.config.settings)))
    for name in RUN_FILES:
        if (run.folder / name).is_symlink():  # a link in somebody else's run could point to any of the user's files
            raise UserError(f"{run.folder / name} is a symbolic link; replace it with the file itself")
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, folder / name)


def _send(folder: Path, repo: str, public: bool, token: str | None) -> tuple[str, str]:
    """Create `repo` unless it exists and commit the folder's files to it; returns its URL and "private" or "public"."""
    api = HfApi(token=token, library_name="fastvit-train", library_version=__version__)
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.model_info(repo).private)
        if not private and not public:
            raise UserError(f"{repo} exists and is public; give --public to push to it, or choose another name")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Push from fastvit-train")
    except UserError:
        raise
    except Exception as error:  # the exception's type depends on the HTTP library that huggingface_hub uses
        raise UserError(f"{api.endpoint} did not accept {repo}: {_reason(error)}") from None
    return str(url), "private" if private else "public"


def _reason(error: BaseException) -> str:
    """Return the Hub's response, or why it was not reached, and what to do next."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            message = getattr(cause, "server_message", None)
            return f"{HINTS.get(status, 'push again later')} (HTTP status {status}{f': {message}' if message else ''})"
        cause = cause.__cause__
    return f"{str(error) or type(error).__name__}; check the network and HF_ENDPOINT"
