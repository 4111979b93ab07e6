"""The fenced blocks of the documentation, and the shell commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_NEEDS = re.compile(r"# Needs (?P<what>[^\n]+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """What the block says, to its reader too, that it needs and a test has not: its first line is "# Needs ..."."""
        match = _NEEDS.match(self.text)
        return match["what"] if match else None


def blocks(page: str, language: str) -> list[Block]:
    """The page's blocks of a language, in order."""
    text = (ROOT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start("text")) + 1
            lines = match["text"].splitlines(keepends=True)
            found.append(Block(page, line, language, "".join(row.removeprefix(match["indent"]) for row in lines)))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command in a bash block, without variables set in front of it and without redirections."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "||", "|", ";"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)
