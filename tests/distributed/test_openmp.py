"""How long OpenMP's idle threads spin, as the command line sets it."""

import sys

import pytest

from tests.support import run

PRINT = (
    "import os; from fastvit_train.cli.main import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
)


@pytest.mark.parametrize(
    ("before", "env", "expected"),
    [
        ("", {}, "20000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        pytest.param("import torch; ", {}, "None", marks=pytest.mark.slow),  # which has read the variable
    ],
)
def test_the_command_line_limits_spinning_unless_the_user_chose(
    before: str, env: dict[str, str], expected: str
) -> None:
    done = run([sys.executable, "-c", before + PRINT], **env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == expected, done.stderr
