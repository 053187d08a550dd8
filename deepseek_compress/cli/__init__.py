"""The `dsc` command: parse, call one library function, render."""

from deepseek_compress.cli.app import app, main

__all__ = ["app", "main"]
