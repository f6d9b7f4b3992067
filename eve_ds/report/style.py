"""Style sheet of the page: for any width, light and dark screens, and paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --panel: #ffffff; --ink: #23262b; --muted: #6b7078; --line: #e3e1dc; --grid: #ecebe7;
  --c1: #2f6690; --c2: #c0612b; --c3: #5b8c5a; --c4: #7d5ba6; --c5: #b8962e; --c6: #3d9a9a;
  --c1-rgb: 47, 102, 144; --c2-rgb: 192, 97, 43;
  --right: #3c7d4f; --wrong: #b3453a; --right-soft: #e6f1e9; --wrong-soft: #f8e8e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17191c; --panel: #1e2125; --ink: #dfe1e4; --muted: #979ca5; --line: #33373d; --grid: #2a2e33;
    --c1: #7fb2dc; --c2: #e8955e; --c3: #8fc08d; --c4: #b79ad6; --c5: #dcc068; --c6: #74c7c7;
    --c1-rgb: 127, 178, 220; --c2-rgb: 232, 149, 94;
    --right: #7fc493; --wrong: #e58a7f; --right-soft: #21352a; --wrong-soft: #3b2725;
  }
}
* { box-sizing: border-box; }
html { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
body { margin: 0; background: var(--paper); color: var(--ink); }
main { max-width: 1080px; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.75rem; font-weight: 650; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 0 0 0.5rem; font-weight: 620; }
h3 { font-size: 1rem; margin: 2rem 0 0.6rem; font-weight: 620; }
section { margin-top: 3.25rem; padding-top: 1.75rem; border-top: 1px solid var(--line); scroll-margin-top: 1rem; }
p, .note { max-width: 70ch; margin: 0.4rem 0 1rem; }
.note { color: var(--muted); font-size: 0.9rem; }
.lead { font-size: 1.1rem; line-height: 1.6; }
.missing { color: var(--muted); border-left: 3px solid var(--line); padding: 0.15rem 0 0.15rem 0.8rem;
  font-size: 0.93rem; }
a { color: var(--c1); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.25rem; font-size: 0.92rem; margin-top: 1.5rem; }
.kicker { color: var(--muted); font-size: 0.85rem; letter-spacing: 0.03em; margin: 0 0 0.3rem; }
.num { font-variant-numeric: tabular-nums; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem; margin: 1.75rem 0 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 0.9rem 1.1rem; }
.tile .label { color: var(--muted); font-size: 0.85rem; }
.tile .value { font-size: 1.7rem; font-weight: 620; letter-spacing: -0.02em; line-height: 1.35; }
.tile .beside { color: var(--muted); font-size: 0.85rem; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
thead th { color: var(--muted); font-weight: 500; font-size: 0.85rem; }
td.n, th.n { text-align: right; white-space: nowrap; }
tbody th { font-weight: 620; white-space: nowrap; }
tr.minor td { color: var(--muted); }
table.sides { width: auto; min-width: min(100%, 40rem); }
table.sides th, table.sides td { vertical-align: top; }
table.sides td { min-width: 7rem; overflow-wrap: anywhere; }
table.sides thead th, td.when { white-space: nowrap; }
table.sides .last, table .fine { color: var(--muted); font-size: 0.85rem; }
.status { border-left: 3px solid var(--c1); padding: 0.15rem 0 0.15rem 0.8rem; }
.bar { position: relative; min-width: 150px; height: 0.7rem; background: var(--grid); border-radius: 3px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--c1); border-radius: 3px; }
.bar b { position: absolute; top: -0.2rem; bottom: -0.2rem; width: 2px; background: var(--c2); }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(285px, 1fr)); gap: 1.1rem 1.4rem; }
figure { margin: 0; min-width: 0; }
.charts figure { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.7rem 0.8rem 0.4rem; }
figcaption { font-size: 0.88rem; line-height: 1.45; }
.charts figcaption { margin-bottom: 0.35rem; }
figcaption .last { color: var(--muted); font-size: 0.8rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text { font-family: inherit !important; }
.key { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin: 0 0.35em 0 0;
  vertical-align: -0.05em; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; font-size: 0.88rem; color: var(--muted);
  margin: 0.2rem 0 0.8rem; }

table.heat { width: auto; border-collapse: separate; border-spacing: 2px; font-size: 0.76rem; }
table.heat th, table.heat td { border: 0; padding: 0.3rem 0.2rem; font-weight: 500; }
table.heat tr.first th, table.heat tr.first td { padding-top: 0.3rem; border-top: 3px solid var(--paper); }
table.heat tbody th { padding-right: 0.8rem; color: var(--muted); }
table.heat td, table.heat th.c { text-align: center; min-width: 1.55rem; }
table.heat td { border-radius: 3px; color: var(--ink); }
table.heat td.idle { color: var(--muted); outline: 1px dashed var(--line); outline-offset: -1px; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 1.1rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 0.9rem; min-width: 0; }
.card p { margin: 0.5rem 0 0; font-size: 0.92rem; overflow-wrap: anywhere; }
.card .fine { color: var(--muted); font-size: 0.84rem; }
.strip { display: grid; gap: 0.5rem; }
.strip.three { grid-template-columns: repeat(3, 1fr); }
.strip.two { grid-template-columns: repeat(2, 1fr); }
.strip figcaption { color: var(--muted); font-size: 0.8rem; margin-top: 0.15rem; }
img { display: block; width: 100%; border-radius: 4px; background: var(--grid); }
img.pixelated { image-rendering: pixelated; }
.absent { display: grid; place-items: center; min-height: 4rem; padding: 0.5rem; text-align: center;
  border: 1px dashed var(--line);
  border-radius: 4px; color: var(--muted); font-size: 0.78rem; overflow-wrap: anywhere; }
.side { display: grid; grid-template-columns: 112px 1fr; gap: 0.9rem; align-items: start; }
.side p:first-child { margin-top: 0; }

.query { margin: 0 0 1.4rem; }
.query > p { margin-bottom: 0.5rem; }
.results { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 0.7rem; max-width: 760px; }
.results figure { border: 2px solid transparent; border-radius: 8px; padding: 4px; }
.results figure.hit { border-color: var(--right); background: var(--right-soft); }
.results figcaption { font-size: 0.8rem; color: var(--muted); padding: 0.2rem 0.1rem 0; }
.texts { list-style: none; margin: 0; padding: 0; font-size: 0.92rem; }
.texts li { display: grid; grid-template-columns: 1.4rem 1fr auto; gap: 0.4rem; padding: 0.2rem 0.5rem;
  border-radius: 5px; }
.texts li.hit { background: var(--right-soft); }
.texts .rank, .texts .score { color: var(--muted); font-variant-numeric: tabular-nums; }
.right { color: var(--right); font-weight: 600; }
.wrong { color: var(--wrong); font-weight: 600; }

.words { font-size: 1rem; line-height: 2; margin: 0 0 0.4rem; max-width: 80ch; overflow-wrap: anywhere; }
.chip { border-radius: 5px; padding: 0.1em 0.4em; white-space: pre; }
.chip.hit { background: var(--right-soft); color: var(--right); }
.chip.miss { background: var(--wrong-soft); color: var(--wrong); }
.chip s { color: var(--muted); text-decoration: none; font-size: 0.85em; }

pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem 0.9rem;
  margin: 0.3rem 0 1rem;
  font: 0.82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; color: var(--c1); font-size: 0.93rem; }
.step { display: flex; justify-content: space-between; gap: 1rem; font-size: 0.93rem; }
.step span:last-child { color: var(--muted); white-space: nowrap; }
@media (max-width: 560px) { .results { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  main { padding: 2rem 1rem 4rem; } }
@media print { section { break-inside: auto; } figure, .card, .query { break-inside: avoid; } nav { display: none; } }
""".strip()
