"""Record a terminal: run commands in a pseudo-terminal, write the screen as SVG. Needs pyte and rich; `dsc` on PATH.

python docs/record.py docs/terminal.svg COMMAND...
"""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 100, 400
NAMED = {"brown": "yellow", "default": None}


def record(command: str, stream: pyte.Stream) -> None:
    """Run one command as a user would see it, its prompt above."""
    stream.feed(f"\x1b[32m$\x1b[0m {command}\r\n")

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        stream.feed(data.decode("utf-8", "replace"))
        return data

    os.environ.update(COLUMNS=str(COLUMNS), LINES="40", TERM="xterm-256color")
    pty.spawn(["bash", "-c", f"stty cols {COLUMNS}; {command}"], read, lambda descriptor: b"")


def main(path: str, commands: list[str]) -> None:
    """Record all commands on one screen."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    for command in commands:
        record(command, stream)
    rows = [number for number, text in enumerate(screen.display) if text.strip()]
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for number in range(rows[-1] + 1):
        text = Text(no_wrap=True)
        for column in range(COLUMNS):
            cell = screen.buffer[number][column]
            text.append(cell.data, _style(cell))
        console.print(text)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="dsc"), flags=re.DOTALL)  # fetch no fonts
    Path(path).write_text(svg, encoding="utf-8")


def _style(cell: pyte.screens.Char) -> Style:
    colour = NAMED.get(cell.fg, cell.fg)
    colour = f"#{colour}" if colour and len(colour) == 6 and all(c in "0123456789abcdef" for c in colour) else colour
    return Style(color=colour and colour.replace("bright", "bright_"), bold=cell.bold)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
