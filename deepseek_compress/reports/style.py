"""The style sheet of the HTML report: one constant, no fonts or files from elsewhere.

Light and dark follow the reader's setting; below 680 pixels the stage table becomes one card a model, and the narrow
variant of each picture takes the place of the wide one.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1b1e25; --soft: #565d6b; --faint: #8a909c; --rule: #e2dfd8; --grid: #eeebe4;
  --accent: #2459a8; --tint: #f1f4fa;
  --s0: #1b1e25; --s1: #2459a8; --s2: #0d7a70; --s3: #a35f05; --s4: #bf3f2a; --s5: #7040b0; --s6: #4c7a1d; --s7: #ad2f74;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, "Liberation Serif", serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e24; --ink: #eae8e3; --soft: #a9afba; --faint: #7c838f; --rule: #30343d; --grid: #262a32;
    --accent: #8db6ff; --tint: #20252f;
    --s0: #eae8e3; --s1: #7fadff; --s2: #4fc9bc; --s3: #e8ad52; --s4: #ff8c75; --s5: #bf9ff5; --s6: #a6d26e; --s7: #f28dc3;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); font-variant-numeric: tabular-nums; }
main { max-width: 1264px; margin: 0 auto; padding: 56px 32px 72px; }
header { margin-bottom: 44px; }
.eyebrow { margin: 0 0 10px; color: var(--soft); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0 0 18px; font: 600 44px/1.08 var(--serif); letter-spacing: -.015em; overflow-wrap: anywhere; }
.verdict { max-width: 46em; margin: 0; font: 400 22px/1.45 var(--serif); color: var(--ink); text-wrap: pretty; overflow-wrap: break-word; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0; margin: 34px 0 0; padding: 0;
  border-top: 2px solid var(--ink); border-bottom: 1px solid var(--rule); }
.facts div { padding: 14px 18px 16px 0; }
.facts dt { color: var(--soft); font-size: 13px; line-height: 1.35; }
.facts dd { margin: 2px 0 0; font: 600 30px/1.15 var(--serif); letter-spacing: -.01em; white-space: nowrap; }
.facts small { display: block; margin-top: 3px; color: var(--soft); font: 400 12.5px/1.35 var(--sans); letter-spacing: 0; white-space: normal; }
section { margin-top: 56px; }
h2 { margin: 0 0 6px; font: 600 26px/1.2 var(--serif); letter-spacing: -.01em; }
h3 { margin: 0 0 10px; font: 600 15px/1.3 var(--sans); }
.lead { max-width: 44em; margin: 0 0 20px; color: var(--soft); font-size: 15px; text-wrap: pretty; }
.note { max-width: 52em; margin: 12px 0 0; color: var(--soft); font-size: 13.5px; text-wrap: pretty; }
figure { margin: 0; padding: 22px 24px 16px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
figcaption { margin-top: 10px; color: var(--soft); font-size: 13.5px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; line-height: 1.35; }
caption { padding: 14px 16px 10px; text-align: left; color: var(--soft); font-size: 13.5px; }
th, td { padding: 10px 8px; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 16px; text-align: left; }
th:last-child, td:last-child { padding-right: 16px; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; white-space: normal; vertical-align: bottom; border-bottom: 1px solid var(--ink); }
thead .groups th { padding-bottom: 0; border: 0; color: var(--faint); font-size: 12px; text-align: left; }
thead .groups th + th { padding-left: 20px; }
tbody th { font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.first { padding-left: 20px; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td small { display: block; color: var(--faint); font-size: 11.5px; }
.about { display: block; max-width: 176px; white-space: normal; font-style: normal; color: var(--soft); font-weight: 400; font-size: 12.5px; }
.none { color: var(--faint); }
tr.reference > * { background: var(--tint); }
tr.ablation th { font-weight: 500; font-style: italic; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 7px; vertical-align: -1px; overflow: visible; }
code, pre { font-family: var(--mono); font-size: .88em; }
pre { margin: 0; padding: 16px 20px; overflow-x: auto; line-height: 1.5; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 28px 32px; }
.panels svg { width: 100%; }
.chain { list-style: none; margin: 0; padding: 0; }
.chain li { padding: 12px 0; border-top: 1px solid var(--rule); }
.chain li:first-child { border-top: 0; }
.chain ol { display: flex; flex-wrap: wrap; gap: 4px 10px; margin: 4px 0 0; padding: 0; list-style: none; color: var(--soft); font-size: 14px; }
.chain ol li { padding: 0; border: 0; }
.chain ol li + li::before { content: "\\2192"; margin-right: 10px; color: var(--faint); }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 0; font-size: 14px; }
.pairs dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 28px 48px; }
details { margin-top: 28px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
details > :not(summary) { margin-top: 12px; }
.chart { display: block; max-width: 100%; height: auto; overflow: visible; font-family: var(--sans); }
.narrow { display: none; }
.chart text { fill: var(--soft); font-size: 12.5px; }
.chart .axis { fill: var(--soft); font-size: 13px; }
.chart .name { font-size: 13px; font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.chart .label { fill: var(--ink); font-size: 13px; }
.chart .figure { fill: var(--ink); font-size: 13px; font-weight: 600; }
.grid { stroke: var(--grid); } .rule { stroke: var(--faint); }
.path { stroke: var(--faint); stroke-width: 1.25; stroke-dasharray: 2 4; }
.track { fill: var(--grid); }
.line, .whisker { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.whisker { stroke-width: 1.5; opacity: .75; }
.mark { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.hollow { fill: var(--card); stroke: var(--c); stroke-width: 2; }
.bar { fill: var(--c); }
.chart text.name[class] { fill: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7 { --c: var(--s7); }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--rule); color: var(--faint); font-size: 13px; }
@media (max-width: 680px) {
  main { padding: 32px 18px 48px; }
  h1 { font-size: 34px; } .verdict { font-size: 19px; } h2 { font-size: 23px; } section { margin-top: 44px; }
  .facts { grid-template-columns: 1fr 1fr; } .facts dd { font-size: 25px; }
  figure { padding: 16px 14px 12px; }
  .wide { display: none; } .narrow { display: block; }
  .columns { grid-template-columns: 1fr; } .pairs { grid-template-columns: 1fr; gap: 0; } .pairs dd { margin-bottom: 8px; }
  .cards .scroll { overflow: visible; background: none; border: 0; }
  .cards table, .cards tbody, .cards tr, .cards caption { display: block; }
  .cards caption { padding: 0 0 12px; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tbody tr { display: grid; grid-template-columns: 1fr 1fr; margin-bottom: 14px; padding: 6px 0 10px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
  .cards tr.reference { background: var(--tint); } .cards tr.reference > * { background: none; }
  .cards tbody tr > * { padding: 6px 14px; border: 0; text-align: left; white-space: normal; }
  .cards tbody th { grid-column: 1 / -1; padding-top: 8px; font-size: 15px; overflow-wrap: anywhere; }
  .cards td::before { content: attr(data-label); display: block; color: var(--soft); font-weight: 400; font-size: 12px; }
  .cards .about { max-width: none; }
  .cards td { font-weight: 600; } .cards td small { font-weight: 400; font-size: 12px; }
}
@media print { body { background: #fff; } details > * { display: block; } figure, tr { break-inside: avoid; } }
"""
