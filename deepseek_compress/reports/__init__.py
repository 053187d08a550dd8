"""A run record becomes JSON, Markdown and one self-contained HTML page; several records become one."""

from deepseek_compress.reports.files import read, write
from deepseek_compress.reports.merging import compare, merge

__all__ = ["compare", "merge", "read", "write"]
