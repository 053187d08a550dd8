"""Make DeepSeek-family models smaller and faster, with proof that they still reason."""

__version__ = "0.1.0"
