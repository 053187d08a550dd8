"""A run record becomes JSON, Markdown and one self-contained HTML page; several records become one."""

from deepseek_compress.reports.compare import compare, merge
from deepseek_compress.reports.write import read, write

__all__ = ["compare", "merge", "read", "write"]
