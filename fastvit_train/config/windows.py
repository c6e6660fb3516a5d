"""What Windows does not allow in the path of a folder."""

import re
from pathlib import Path

RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[<>:"|?*]')
MAX_PATH = 259
"""characters of a path, as long as Windows is not set up for longer ones"""
ROOM = 80
"""characters of the longest path inside of a run's folder, and some more"""


def why_refused(folder: Path) -> str | None:
    """Return why the folder of a run can't have this absolute path on Windows; None if it can.

    Windows would take a reserved name for a device, and leave out a dot or a space at a name's end, so that two runs
    would have one folder (https://learn.microsoft.com/windows/win32/fileio/naming-a-file).
    """
    for name in folder.parts[1:]:
        if RESERVED.fullmatch(name) or FORBIDDEN.search(name) or name.endswith((".", " ")):
            return (
                f"Windows can't have a folder named {name!r}; allowed are names without <>:\"|?*, without a dot or a "
                "space at the end, and not those of devices, such as con, nul or com1"
            )
    if len(str(folder)) + ROOM > MAX_PATH:
        return (
            f"the path {folder} has {len(str(folder))} characters; Windows allows {MAX_PATH - ROOM} for the folder of "
            "a run, so that the files in it have room"
        )
    return None
