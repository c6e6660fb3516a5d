"""The commands and examples of the Markdown pages, in the order in which they are printed."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "SPEEDRUN.md", ROOT / "kernels" / "README.md"]
"""pages whose commands and examples are run"""
ALL_PAGES = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
BENCH_PAGES = [ROOT / "bench" / "README.md", ROOT / "bench" / "RECIPES.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    """`bash` and `python` are run; `sh` is for other machines, and only its flags are checked"""
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell code, one per line."""
        return [line for line in self.text.splitlines() if line.strip()]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page that are in one of these languages."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(language, code) for language, code in fences if language in languages]


def commands(page: Path, *languages: str) -> list[str]:
    """The commands of a page, in order."""
    return [command for block in blocks(page, *languages) for command in block.commands]


def relative_links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that are not addresses on the web, without their anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text))
    return [target for target in targets if target and "://" not in target]


def page_name(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()
