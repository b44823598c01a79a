"""How the report looks: in dark and in light, on a screen and on paper."""

STYLE = """
:root{--ground:#fbfaf8;--sheet:#fff;--ink:#22252b;--quiet:#6b7280;--rule:#e6e3dd;
--kept:#3d7a68;--dropped:#c26a4a;--came:#cfd4da}
@media(prefers-color-scheme:dark){:root{--ground:#15171a;--sheet:#1c1f23;--ink:#e4e6e9;
--quiet:#9aa3ad;--rule:#2d3238;--kept:#5fae97;--dropped:#d98462;--came:#454c55}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:60rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}header p{margin:0;color:var(--quiet)}
h1{margin:.1rem 0 1.5rem;font-size:1.6rem;font-weight:600;overflow-wrap:anywhere}
h2{margin:0 0 .75rem;font-size:1.05rem;font-weight:600}
section{background:var(--sheet);border:1px solid var(--rule);border-radius:8px;
padding:1.1rem 1.25rem;margin-bottom:1rem;overflow-x:auto}
section p{margin:.25rem 0 .75rem;color:var(--quiet);max-width:46rem}
.tiles{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}
.tiles div{display:flex;flex-direction:column}.tiles span{color:var(--quiet)}
.tiles strong{font-size:1.7rem;font-weight:600;line-height:1.25}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .75rem .28rem 0;border-bottom:1px solid var(--rule);text-align:right;
white-space:nowrap;font-weight:400}
th:first-child{text-align:left}tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--quiet);font-size:.85rem}tbody th{font-family:ui-monospace,monospace;
font-size:.85rem}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
td.bar{width:30%;min-width:7rem;padding-right:0}.bar div{height:.6rem;border-radius:3px;
min-width:1px}
.bar .kept,i.kept{background:var(--kept)}.bar .dropped{background:var(--dropped)}
i.came{background:var(--came)}
i{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin:0 .2rem 0 .6rem}
i:first-child{margin-left:0}
.lengths{display:flex;gap:.35rem;max-width:48rem}.lengths>div{flex:1 1 0;text-align:center;
min-width:1.4rem}
.lengths span{font-size:.75rem;color:var(--quiet);white-space:nowrap}
.pair{display:flex;align-items:flex-end;gap:1px;height:9rem;border-bottom:1px solid var(--rule)}
.pair div{flex:1 1 0;border-radius:2px 2px 0 0}
.pair .came{background:var(--came)}.pair .kept{background:var(--kept)}
details{border-top:1px solid var(--rule);padding:.4rem 0}summary{cursor:pointer;
font-family:ui-monospace,monospace;font-size:.85rem}
figure{margin:.75rem 0}figcaption{color:var(--quiet);font-size:.85rem}
pre{margin:.25rem 0;padding:.6rem .8rem;background:var(--ground);border-radius:6px;
white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.45 ui-monospace,monospace}
@media print{details{break-inside:avoid}section{break-inside:avoid;border-color:#ccc}}
"""
