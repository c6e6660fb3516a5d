"""Types of the verbs' arguments, with the names that they have in help texts."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Run = Annotated[str, arg(metavar="RUN")]
Runs = Annotated[tuple[str, ...], arg(metavar="RUN ...", help_behavior_hint="")]
RunFolders = Annotated[tuple[Path, ...], arg(metavar="RUN ...", help_behavior_hint="")]
RunsFolder = Annotated[tuple[Path, ...], arg(metavar="[RUNS_DIR]", help_behavior_hint="")]
Images = Annotated[tuple[str, ...], arg(metavar="[IMAGE ...]", help_behavior_hint="")]
RecipeName = Annotated[tuple[str, ...], arg(metavar="[RECIPE]", help_behavior_hint="")]
Repository = Annotated[str, arg(metavar="USER/NAME")]
Search = Annotated[tuple[str, ...], arg(metavar="SETTING=VALUES ...", help_behavior_hint="")]
Checkpoint = Annotated[str | None, arg(metavar="best|last|STEP")]
AttentionName = Annotated[str | None, arg(metavar="NAME")]
DatasetArgument = Annotated[str | None, arg(metavar="NAME")]
License = Annotated[str | None, arg(metavar="NAME")]
Pattern = Annotated[str | None, arg(metavar="PATTERN")]
DataDir = Annotated[str | None, arg(metavar="FOLDER")]
ConfigFile = Annotated[str | None, arg(metavar="FILE")]
OutputFolder = Annotated[Path | None, arg(metavar="FOLDER")]
OutputPath = Annotated[Path | None, arg(metavar="PATH")]
