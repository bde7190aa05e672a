"""The style sheet of the report: one column, light or dark as the reader's system asks."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d1f21; --soft: #62676d; --line: #dedfdc; --faint: #f3f3f0;
  --link: #1a5fb4; --met: #22723a; --missed: #a5371b; --warn: #8a5a00; --warn-paper: #fdf4de;
  --s0: #1f6fb5; --s1: #d1660a; --s2: #2a8a43; --s3: #c22f3d; --s4: #7a54b0;
  --s5: #86594c; --s6: #c4509b; --s7: #5d6670; --s8: #8d8a12; --s9: #0f93a5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181a; --ink: #e6e5e1; --soft: #9ba1a7; --line: #34383c; --faint: #1f2225;
    --link: #84b9f5; --met: #79cf8f; --missed: #f29378; --warn: #e9bd62; --warn-paper: #2b2517;
    --s0: #6cb0ee; --s1: #f59a4c; --s2: #66c97e; --s3: #f3757f; --s4: #b396e6;
    --s5: #c79a8b; --s6: #ec8cca; --s7: #a8b1ba; --s8: #cfcb52; --s9: #4fcddd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.3rem; line-height: 1.3; font-weight: 650; }
h3 { margin: 0; font-size: 1.05rem; font-weight: 650; }
p { margin: .5rem 0; max-width: 44rem; }
a { color: var(--link); text-underline-offset: .15em; text-decoration-thickness: 1px; }
.soft, caption, figcaption, dt { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0;
  list-style: none; }

.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums;
  paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.rule { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; fill: none; }
.chart polyline { fill: none; stroke: currentColor; stroke-width: 1.75; stroke-linejoin: round; }
.mark { fill: currentColor; stroke: currentColor; stroke-width: 1; }
.mark.hollow { fill: var(--paper); stroke-width: 1.75; }
.faint { opacity: .4; }
.key { width: 1em; height: 1em; vertical-align: -.12em; margin-right: .3em; overflow: visible; }
.series-0 { color: var(--s0); } .series-1 { color: var(--s1); } .series-2 { color: var(--s2); }
.series-3 { color: var(--s3); } .series-4 { color: var(--s4); } .series-5 { color: var(--s5); }
.series-6 { color: var(--s6); } .series-7 { color: var(--s7); } .series-8 { color: var(--s8); }
.series-9 { color: var(--s9); } .series-other { color: var(--soft); }

figure { margin: 0; min-width: 0; }
figcaption { margin-top: .35rem; font-size: .875rem; }
.pair { display: grid; gap: 1.5rem 2.5rem; align-items: start; margin-bottom: 1.5rem; }
.pair > * { min-width: 0; }
.figures { display: grid; gap: 1.25rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
img { display: block; width: 100%; height: auto; border-radius: 4px; background: #fff; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem;
  font-variant-numeric: tabular-nums; }
caption { padding: 0 0 .5rem; text-align: left; font-size: .875rem; }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top; font-weight: 400; }
thead th { color: var(--soft); font-size: .8125rem; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
th.group { padding-top: .8rem; text-align: left; font-weight: 600; }
th.group .soft { font-weight: 400; font-size: .875rem; }
td.text, th.text { text-align: left; }
td.measured { font-weight: 600; white-space: nowrap; }
td small { font-weight: 400; color: var(--soft); }
tbody tr + tr td { border-top: 1px solid var(--faint); }
.met { color: var(--met); } .missed { color: var(--missed); }
td a { text-decoration: none; padding: 0 .1em; font-size: .8125rem; }
.detail table { max-width: 44rem; }
th[scope="row"] { min-width: 8rem; overflow-wrap: anywhere; }
.notes { margin: .75rem 0 0; padding-left: 1.75rem; font-size: .875rem; color: var(--soft); }
.notes li:target { color: var(--ink); background: var(--faint); }

article { padding: 1.25rem 0; border-top: 1px solid var(--line); }
article:first-of-type { border-top: 0; padding-top: 0; }
.warnings { margin: .75rem 0; padding: .6rem .9rem .6rem 2rem; font-size: .9375rem;
  color: var(--warn); background: var(--warn-paper); border-radius: 4px; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9375rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem;
  margin: .75rem 0; font-size: .875rem; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre { margin: .75rem 0; padding: .75rem; overflow-x: auto; font-size: .8125rem; line-height: 1.4;
  background: var(--faint); border-radius: 4px; }

@media (min-width: 45rem) {
  body { padding: 3rem 2rem 5rem; }
}
@media (min-width: 58rem) {
  .pair { grid-template-columns: minmax(0, 30rem) minmax(0, 1fr); }
}
@media (max-width: 30rem) {
  th, td { padding: .3rem .25rem; }
  table { font-size: .875rem; }
  thead th { font-size: .75rem; }
}
@media print { body { max-width: none; } details { display: none; } }
"""
