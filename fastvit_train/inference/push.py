"""Trained models, sent to the Hugging Face Hub with a model card; nothing is sent before all of it is written."""

import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastvit_train import __version__
from fastvit_train.config.overrides import map_marked
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import Mark
from fastvit_train.inference.export import write_verified
from fastvit_train.inference.model_card import model_card
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.runs.run_folder import to_yaml
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, printable

OF_A_RUN = ("summary.json", "metrics.jsonl", "curves.png")
"""what goes with the model where a run of ours left it, besides its settings"""
LOGIN = "`hf auth login`, or HF_TOKEN, with a token that may write"
ANSWERS = {
    401: f"it doesn't know the token; give {LOGIN}",
    403: f"the token may not write there; give {LOGIN} to that account",
    404: f"it knows no such model, or hides it from this token; give {LOGIN}",
    409: "something else is being done there at the same time; push again",
}


def push_run(run: str, repo: str, *, public: bool = False, dry_run: bool = False, license: str | None = None) -> str:
    """Send a trained model to the Hub, as timm loads it, with its model card and what its run wrote.

    Args:
        run: as in `load_run`.
        repo: USER/NAME; it is created where there is none.
        public: whether everyone may see it. What is public already is pushed to only with this.
        dry_run: write the folder, `hub` in the run's, and send nothing.
        license: the Hub's name of one, such as apache-2.0, for the card; by default the card has none.

    Returns:
        The model's address, or the folder.

    Raises:
        UserError: where the model or the name is none, or the Hub can't be reached or doesn't take it.
    """
    _check_names(repo, license)
    token = None if dry_run else get_token()
    if not dry_run and token is None:
        raise UserError(f"the Hugging Face Hub takes a model from whom it knows: give {LOGIN}")
    loaded = load_run(run, device="cpu")
    if dry_run:
        folder = (loaded.folder or Path()) / "hub"
        with atomic_io.as_save_error(f"{folder} can't be written"), atomic_io.staged(folder) as partial:
            _write(loaded, repo, license, partial)
        print(f"written to {printable(str(folder))}; nothing was sent")
        return str(folder)
    with tempfile.TemporaryDirectory() as temporary:
        with atomic_io.as_save_error(f"{temporary} can't be written"):
            _write(loaded, repo, license, Path(temporary) / "hub")
        url, seen_by = _send(Path(temporary) / "hub", repo, public, token)
    print(f"pushed to {printable(url)} ({seen_by})")
    return url


def _check_names(repo: str, license: str | None) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(str(error)) from None
    if "/" not in repo:
        raise UserError(f"{repo} is no USER/NAME; allowed: your name on the Hub, or an organisation's, and the model's")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,50}", license):
        raise UserError(f"--license {license!r} is no name of a license on the Hub, such as apache-2.0 or cc-by-4.0")


def _write(run: TrainedModel, repo: str, license: str | None, folder: Path) -> None:
    write_verified(run, "timm", folder)
    (folder / "README.md").write_text(model_card(run, repo, license))
    if run.folder is None or run.config is None:
        return
    (folder / "config.yaml").write_text(to_yaml(_without_places(run.config.settings)))
    for name in OF_A_RUN:
        if (run.folder / name).is_symlink():  # a run from elsewhere could send any file of yours
            raise UserError(f"{run.folder / name} is a link; what is pushed must lie in the run's folder")
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, folder / name)


def _without_places(config: TrainConfig) -> TrainConfig:
    """`config` with the last name alone of paths that say how this machine's folders are called."""

    def last(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    return map_marked(config, Mark.PATH, last)


def _send(folder: Path, repo: str, public: bool, token: str | None) -> tuple[str, str]:
    """Create `repo` where it isn't there and commit the folder's files to it; returns its address and who sees it."""
    api = HfApi(token=token, library_name="fastvit-train", library_version=__version__)
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.model_info(repo).private)
        if not private and not public:
            raise UserError(f"{repo} is there already and public; give --public to push to it, or another name")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Push from fastvit-train")
    except UserError:
        raise
    except Exception as error:  # the HTTP library beneath changes from version to version
        raise UserError(f"{api.endpoint} did not take {repo}: {_reason(error)}") from None
    return str(url), "private" if private else "public"


def _reason(error: BaseException) -> str:
    """What the Hub answered, or why it was not reached, and what to do next."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            said = getattr(cause, "server_message", None)
            return f"{ANSWERS.get(status, 'push again later')} (it answered {status}{f': {said}' if said else ''})"
        cause = cause.__cause__
    return f"{str(error) or type(error).__name__}; see whether this machine reaches it, and HF_ENDPOINT"
