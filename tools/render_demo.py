#!/usr/bin/env python3
"""Draws what tools/demo.sh prints as docs/demo.svg, so that the picture in the README is real output.

    python3 tools/render_demo.py             run the demo and draw it
    python3 tools/render_demo.py < LOG       draw a log of it
"""

import html
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINE, CHAR, MARGIN = 112, 17, 7.83, 16
COLOURS = {"heading": "#e6c07b", "command": "#61afef", "text": "#d7dae0"}


def drawn(log):
    lines = []
    for raw in log.strip("\n").splitlines():
        raw = raw.rstrip()
        kind = "heading" if raw.startswith("# ") or raw.startswith("demo: ") else "command" if raw.startswith("$ ") else "text"
        wrapped = textwrap.wrap(raw, COLUMNS, subsequent_indent="    ", drop_whitespace=False, replace_whitespace=False) or [""]
        lines += [(kind, piece) for piece in wrapped]
    height, width = LINE * len(lines) + 2 * MARGIN, round(CHAR * COLUMNS) + 2 * MARGIN
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
           f'<rect width="{width}" height="{height}" rx="8" fill="#21252b"/>',
           '<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" xml:space="preserve">']
    for i, (kind, text) in enumerate(lines):
        if text:
            weight = ' font-weight="bold"' if kind == "heading" else ""
            out.append(f'<text x="{MARGIN}" y="{MARGIN + LINE * i + 13}" fill="{COLOURS[kind]}"{weight}>{html.escape(text)}</text>')
    return "\n".join(out + ["</g>", "</svg>"]) + "\n"


def main():
    if sys.stdin.isatty() or len(sys.argv) > 1:
        log = subprocess.run(["bash", str(ROOT / "tools/demo.sh")], check=True, capture_output=True, text=True).stdout
    else:
        log = sys.stdin.read()
    # Where it lay while it ran says nothing to a reader; how far it was on the way, neither.
    log = re.sub(r"/tmp/tmp\.\w+", "/tmp/demo", log.replace(f"{ROOT}/", "").replace(str(Path.home()), "~"))
    log = "\n".join(line for line in log.splitlines() if not re.match(r"[a-z-]+: +\d+% ", line))
    (ROOT / "docs/demo.svg").write_text(drawn(log), encoding="utf-8")
    print("docs/demo.svg written")


if __name__ == "__main__":
    main()
