"""The style sheet of the page; light and dark from one set of variables."""

from __future__ import annotations

from pangu_locmoe.report.pictures import SERIES

_LIGHT = tuple(colour.lstrip("#") for colour in SERIES)
_DARK = ("5fa3ea", "f08a4b", "3fbf9f", "b98be0", "dcb13c", "f0708a", "9fb3c4", "9cc257")


def _series(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{index}:#{colour};" for index, colour in enumerate(colours))


STYLE = (
    """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--rule:#d9dde2;--grid:#e9ecef;--page:#fff;--panel:#f6f7f9;"""
    + _series(_LIGHT)
    + """}
@media (prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#9aa5b1;--rule:#363c44;--grid:#2a2f36;--page:#15181c;--panel:#1d2126;"""
    + _series(_DARK)
    + """}}
*{box-sizing:border-box}
body{margin:0 auto;padding:3rem 1.25rem 5rem;max-width:66rem;background:var(--page);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
h1{font-size:1.85rem;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;font-weight:650;margin:3.25rem 0 .4rem;padding-top:.9rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;font-weight:650;margin:1.6rem 0 .2rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:46rem}
.soft,header p,figure p,section>p{color:var(--soft)}
header p{overflow-wrap:anywhere}
.notes{margin:1rem 0 0;padding:.6rem .9rem;background:var(--panel);border-left:3px solid var(--c1);font-size:.9rem}
.notes p{margin:.15rem 0;color:inherit;max-width:none;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13.5rem,1fr));gap:1.5rem 1.75rem;margin:2rem 0 0}
.tiles dt{font-size:.85rem;color:var(--soft)}
.tiles dd{margin:0;font-size:1.75rem;line-height:1.25;font-weight:600;letter-spacing:-.01em}
.tiles small{display:block;font-size:.8rem;line-height:1.4;font-weight:400;letter-spacing:0;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:0 2rem;margin-top:1rem}
figure{margin:0;min-width:0;display:grid;grid-row:span 3;grid-template-rows:subgrid;grid-template-columns:100%}
figcaption{font-size:.95rem;margin-bottom:.35rem}
figcaption b{font-weight:600}
figure p{font-size:.82rem;line-height:1.45;margin:.2rem 0 1.6rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;color:var(--soft);margin:.2rem 0}
.legend span{display:inline-flex;align-items:center;gap:.4rem;overflow-wrap:anywhere}
.legend i{flex:none;width:1rem;height:.2rem;border-radius:1px;background:currentColor}
svg{display:block;width:100%;max-width:34rem;height:auto;overflow:visible;font-size:11px;stroke-linejoin:round;stroke-linecap:butt}
svg text{fill:var(--soft);font-variant-numeric:tabular-nums}
"""
    + "".join(f".c{index}{{color:var(--c{index})}}" for index in range(len(_LIGHT)))
    + """
.scroll{overflow-x:auto;margin:1.1rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.36rem 0 .36rem 1.6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
th:first-child{padding-left:0;text-align:left}
thead th{font-weight:500;color:var(--soft);border-bottom:1px solid var(--rule);vertical-align:bottom;overflow-wrap:break-word;max-width:14rem}
th.t,td.t{text-align:left}
td{white-space:nowrap}table.text td{white-space:normal}
tbody th{font-weight:400;min-width:8rem}
table.text th,table.text td{text-align:left;overflow-wrap:anywhere}
.sample{margin:1.1rem 0;max-width:46rem}
.sample h3{margin:0 0 .2rem}
.sample blockquote{margin:0;padding:.15rem 0 .15rem .9rem;border-left:2px solid var(--rule);white-space:pre-wrap;overflow-wrap:anywhere}
.sample mark{background:none;color:var(--soft)}
details{margin:.8rem 0}summary{cursor:pointer}
pre{overflow-x:auto;padding:.9rem 1rem;background:var(--panel);font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:30rem){body{padding:1.75rem 1rem 3rem}.tiles{grid-template-columns:1fr 1fr;gap:1.2rem 1rem}.tiles dd{font-size:1.4rem}svg{font-size:12.5px}}
@media print{body{max-width:none;padding:0}figure{break-inside:avoid}}
"""
)
