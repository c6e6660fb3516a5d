"""Names of runs for which --exp-name is not given: recipe, data, model and seed, and a number if the name is in use."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from fastvit_train.config.overrides import differences, to_plain
from fastvit_train.config.recipes import DEFAULT_RECIPE
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import FROM_DATA_DIR, HUGGING_FACE, MAX_FOLDER_NAME_BYTES
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils.errors import UserError

MAX_PART_BYTES = MAX_FOLDER_NAME_BYTES // 3
"""of the data folder's name, so that model, seed and number fit too"""


def default_name(config: TrainConfig) -> str:
    """Return `RECIPE-DATA-MODEL-seedN`, where DATA is the data set or the name of the folder of images.

    The recipe is left out if it is the default one, and the data set if the recipe is named after it.
    """
    return f"{default_group(config)}-seed{config.run.seed}"


def default_group(config: TrainConfig) -> str:
    """Return the default name without the seed, for runs that differ only in it."""
    recipe, data = config.run.recipe, config.data
    named = data.data_dir if data.dataset in FROM_DATA_DIR else data.dataset
    source = _plain(Path(named.removeprefix(HUGGING_FACE)).resolve().name)
    parts = [] if recipe == DEFAULT_RECIPE else [recipe]
    parts += [] if recipe.endswith(f"-{data.dataset}") else [source or data.dataset]
    model = _plain(Path(re.sub("^(hf-hub|local-dir):", "", config.model.model)).name)
    return "-".join([*parts, model])


def free_names(runs_dir: Path, name: str) -> Iterator[str]:
    """Yield `name`, `name-2`, `name-3` and so on, from the first one that no folder has, nor any after it."""
    last = max(_numbers(runs_dir, name), default=0)
    return (_numbered(name, number) for number in itertools.count(last + 1))


def find_run(config: TrainConfig, name: str) -> str | None:
    """Return the newest run with the default name `name`, or with a number after it, to be resumed or overwritten.

    Prefers the newest one with the settings in `config`. If there is no run of that name, this returns one with the
    name that earlier versions of this package gave, if its settings are these. None if there is none of them.
    """
    runs_dir, earlier = Path(config.run.runs_dir), f"{config.data.dataset}-{config.model.model}-seed{config.run.seed}"
    runs = [_numbered(name, number) for number in _numbers(runs_dir, name)]
    same = [run for run in (*runs, *([] if runs else [earlier])) if _has_settings(runs_dir / run, config)]
    found = same or runs
    return found[-1] if found else None


def find_group(runs_dir: Path, group: str, seeds: range) -> tuple[str, str]:
    """Return the newest group name under which one of the `seeds` has a run, and the first one after it."""

    def is_used(name: str) -> bool:
        return any((runs_dir / f"{name}-seed{seed}").exists() for seed in seeds)

    names = (_numbered(group, number) for number in itertools.count(1))
    used = list(itertools.takewhile(is_used, names))
    return (used or [group])[-1], _numbered(group, len(used) + 1)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _numbers(runs_dir: Path, name: str) -> list[int]:
    """Return the numbers of the folders that are named `name`, in ascending order.

    A folder that holds only what a run that was killed before its start has left counts as free.
    """
    try:
        names = [path.name for path in runs_dir.iterdir()]
    except OSError:  # the folder does not exist, or cannot be read, which is reported when it is written
        return []
    matches = [re.fullmatch(rf"{re.escape(name)}(?:-([2-9]|[1-9]\d+))?", found) for found in names]
    return sorted(int(match[1] or 1) for match in matches if match and not RunFolder(runs_dir / match[0]).is_unused())


def _has_settings(run: Path, config: TrainConfig) -> bool:
    try:
        return not differences(RunFolder(run).read_config(), to_plain(config))
    except UserError:
        return False


def _plain(name: str) -> str:
    """Keep letters, digits and `._` of a name, so that no shell needs quotes for it."""
    plain = re.sub(r"[^\w.]+", "-", name).strip("-.")
    return plain.encode()[:MAX_PART_BYTES].decode(errors="ignore")
