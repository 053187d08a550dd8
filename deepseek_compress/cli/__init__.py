"""The `dsc` command: parse, call one library function, render."""

try:
    from deepseek_compress.cli.app import app, main
except KeyboardInterrupt:  # while there is nobody yet who would say so in a line
    raise SystemExit(130) from None

__all__ = ["app", "main"]
