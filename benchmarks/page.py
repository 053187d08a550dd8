"""The report page in a headless Chromium, 1, 6 and 20 models at 390 and 1440 pixels: time to load, size, pictures.

What must hold of the page is tested (`tests/reports/test_browser.py`); this measures and leaves reports/page.md and
reports/page-MODELS-WIDTH.png. Needs Debian's `chromium`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import REPORTS, machine
from deepseek_compress.reports.page import page
from tests.reports.browser import Browser, found
from tests.reports.sample_record import record

LOADS = 9
HEIGHT = {390: 2600, 1440: 2600}  # of a picture, from the top
SCALE = {390: 0.75, 1440: 0.5}
TOOK = "performance.timing.loadEventEnd - performance.timing.navigationStart"


def main() -> None:
    program = found()
    if program is None:
        sys.exit("no Chromium; apt-get install chromium")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(program, Path(folder) / "profile")
        try:
            for count in (1, 6, 20):
                rows += measured(browser, count, Path(folder) / "page.html")
        finally:
            browser.close()
    result = {"machine": machine(), "load": os.getloadavg()[0], "rows": rows}
    (REPORTS / "page.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (REPORTS / "page.md").write_text(written(result), encoding="utf-8")
    print(written(result))
    print(json.dumps(result))


def measured(browser: Browser, count: int, path: Path) -> list[dict[str, Any]]:
    """One row a width, and its picture."""
    start = time.process_time()
    html = page(record(count))
    made = time.process_time() - start
    path.write_text(html, encoding="utf-8")
    rows = []
    for width in (390, 1440):
        times = []
        for _ in range(LOADS):
            browser.show(path, width, {"prefers-color-scheme": "light"})
            times.append(browser.value(TOOK))
        height = min(HEIGHT[width], browser.value("document.documentElement.scrollHeight"))
        picture = REPORTS / f"page-{count}-{width}.png"
        browser.picture(picture, height, SCALE[width])
        Image.open(picture).convert("RGB").quantize(48).save(picture, optimize=True)
        rows.append({"models": count, "width": width, "bytes": len(html.encode()), "made_cpu_s": round(made, 2),
                     "load_ms_least": min(times), "load_ms_median": sorted(times)[LOADS // 2]})  # fmt: skip
    return rows


def written(result: dict[str, Any]) -> str:
    lines = [
        "# The report page in Chromium",
        f"`python -m benchmarks.page`: {LOADS} loads each; {result['machine']['cpu']}, load {result['load']:.1f}.",
        "| models | pixels | page | CPU to make it | load, least | load, median |\n|---:|---:|---:|---:|---:|---:|\n"
        + "\n".join(
            f"| {row['models']} | {row['width']} | {row['bytes'] / 1000:.0f} kB | {row['made_cpu_s']:.2f} s | "
            f"{row['load_ms_least']:.0f} ms | {row['load_ms_median']:.0f} ms |"
            for row in result["rows"]
        ),
    ]
    pictures = (
        f"![{r['models']} models, {r['width']} pixels](page-{r['models']}-{r['width']}.png)" for r in result["rows"]
    )
    return "\n\n".join([*lines, *pictures]) + "\n"


if __name__ == "__main__":
    main()
