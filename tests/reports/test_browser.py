"""The page in a real browser, with 1, 6 and 20 models, on a telephone and a desk: what only a browser can tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, found
from sample_record import record

from deepseek_compress.reports.page import page

AXE = Path(__file__).parents[2] / ".venv-axe" / "node_modules" / "axe-core" / "axe.min.js"
HEAVY = 1_000_000  # bytes of a page; how long one loads is measured by benchmarks/page.py
SERIOUS = ("serious", "critical")

# Elements that end right of the window, and regions and texts that have to be scrolled sideways.
OVERFLOW = """
(() => {
  const wide = document.documentElement.scrollWidth, found = wide > innerWidth ? [`page ${wide}`] : [];
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect(), name = `${one.tagName} ${one.textContent.slice(0, 40)}`;
    if (box.width && box.right > innerWidth + 1 && !one.closest("thead")) found.push(`${name}: ${box.right}`);
    if (one.matches(".scroll, pre") && one.scrollWidth > one.clientWidth + 1) found.push(`${name} scrolls`);
  }
  return found.slice(0, 20);
})()
"""
VIOLATIONS = "axe.run().then((all) => all.violations.map((one) => [one.impact, one.id, one.nodes[0].html]))"

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(found() is None, reason="no Chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = found()
    assert program is not None
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    paths = {}
    for count in (1, 6, 20):
        paths[count] = tmp_path_factory.mktemp("pages") / f"{count}.html"
        paths[count].write_text(page(record(count)), encoding="utf-8")
    return paths


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_the_page_is_quiet_and_fits(
    browser: Browser, pages: dict[int, Path], count: int, width: int, scheme: str
) -> None:
    browser.show(pages[count], width, {"prefers-color-scheme": scheme})
    assert browser.value(OVERFLOW) == []
    browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.value(OVERFLOW) == []
    assert browser.said == []
    assert pages[count].stat().st_size < HEAVY


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core; make .venv-axe/.installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_nothing_serious_is_inaccessible(
    browser: Browser, pages: dict[int, Path], count: int, width: int, scheme: str
) -> None:
    browser.show(pages[count], width, {"prefers-color-scheme": scheme})
    browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.value(AXE.read_text(encoding="utf-8") + "; 1")
    assert [one for one in browser.value(VIOLATIONS) if one[0] in SERIOUS] == []


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core; make .venv-axe/.installed")
def test_the_judges_see_what_is_wrong(browser: Browser, pages: dict[int, Path], tmp_path: Path) -> None:
    """The same questions of a spoiled page: pale text, a wide table, a script and a picture it may not have."""
    html = pages[6].read_text(encoding="utf-8")
    html = re.sub(r"--soft: #\w+", "--soft: #d0d0d0", html).replace("white-space: normal", "white-space: nowrap")
    html = html.replace("<main>", "<main><script>document.title = 'run'</script><img src='http://127.0.0.1:9/a.png'>")
    (tmp_path / "spoiled.html").write_text(html, encoding="utf-8")
    browser.show(tmp_path / "spoiled.html", 390, {"prefers-color-scheme": "light"})
    assert browser.value(OVERFLOW) != []
    assert len(browser.said) >= 2
    assert browser.value("document.title") != "run"
    browser.value(AXE.read_text(encoding="utf-8") + "; 1")
    assert {"color-contrast", "image-alt"} <= {one[1] for one in browser.value(VIOLATIONS) if one[0] in SERIOUS}


def names(browser: Browser) -> list[str]:
    return list(browser.value("[...document.querySelectorAll('table.models tbody th')].map((one) => one.dataset.sort)"))


def test_tables_sort_by_a_click_and_by_the_list(browser: Browser, pages: dict[int, Path]) -> None:
    browser.show(pages[6], 1440)
    models = [*record(6)["models"], *record(6)["ablations"]]
    size = "[...document.querySelectorAll('table.models thead button')].find((b) => b.textContent === 'Size').click()"
    ordered = [model["name"] for model in sorted(models, key=lambda model: model["bytes"])]
    browser.value(size)
    assert names(browser) == ordered
    browser.value(size)
    assert names(browser) == ordered[::-1]
    state = "[...document.querySelectorAll('table.models [aria-sort=descending]')].map((one) => one.textContent)"
    assert browser.value(state) == ["Size"]
    browser.value(
        "(() => { const list = document.querySelector('.sort select');"
        " list.value = ''; list.dispatchEvent(new Event('change')); })()"
    )
    assert names(browser) == [model["name"] for model in models]


def test_unknown_values_sort_last_both_ways(browser: Browser, pages: dict[int, Path]) -> None:
    browser.show(pages[6], 1440)
    ratio = "[...document.querySelectorAll('table.models thead button')].find((b) => b.textContent === 'Of reference')"
    for _ in range(2):
        browser.value(f"{ratio}.click()")
        assert names(browser)[-1] == "teacher"


def test_marks_tell_their_details(browser: Browser, pages: dict[int, Path]) -> None:
    browser.show(pages[6], 1440)
    told = browser.value("[...document.querySelectorAll('.wide .detail > title')].map((one) => one.textContent)")
    assert any(text.startswith("w4a8\nExact match: 82.4 % [80.5 %, 84.2 %]\nSize on disk: 556 MB") for text in told)


def test_the_printed_page_is_whole(browser: Browser, pages: dict[int, Path], tmp_path: Path) -> None:
    browser.show(pages[6], 1440, {"prefers-color-scheme": "dark"})
    browser.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.call("Emulation.setDeviceMetricsOverride", width=1032, height=700, deviceScaleFactor=1, mobile=False)
    assert browser.value(OVERFLOW) == []
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("[...document.querySelectorAll('details')].every((one) => one.open)")
