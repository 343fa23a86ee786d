"""Studies run from the command line: one of them, by turns, in its short form; killed in between; and refused politely.

The turn goes by the number of commits, so that over some time all run that have a recorded result. REPRODUCE="slug" picks one.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
moiety = str(Path(os.environ.get("MOIETY_BIN", root / "build/bin")) / "moiety")


def run(*words, **more):
    return subprocess.run([moiety, *words], text=True, capture_output=True, timeout=1000, **more)


with tempfile.TemporaryDirectory() as empty:
    # To list studies needs no text, and prepares none.
    listed = run("reproduce", "--list", "--json", env={**os.environ, "MOIETY_CACHE": empty})
    assert listed.returncode == 0 and not os.listdir(empty), listed.stderr
studies = [s["slug"] for s in json.loads(listed.stdout)]
recorded = [s for s in studies if (root / f"results/systems/{s}.json").exists()]
assert studies == sorted(studies) and "deepseekmoe" in studies, studies
for slug in studies:
    assert (root / f"docs/systems/{slug}.md").exists(), f"{slug} has a study but no page"

for words, part in ((["deepseekmo"], "deepseekmoe"), ([], "--list"), (["deepseekmoe", "--budget", "huge"], "huge"),
                    (["deepseekmoe", "--seeds", "0"], "seeds"), (["deepseekmoe", "--cell", "dense"], "ARM:SEED")):
    r = run("reproduce", *words)
    assert r.returncode != 0 and part in r.stderr, (words, r.stderr)

turn = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=root, text=True, capture_output=True).stdout.strip()
slug = os.environ.get("REPRODUCE") or recorded[int(turn or 0) % len(recorded)]
with tempfile.TemporaryDirectory() as folder:
    words = ["reproduce", slug, "--budget", "short", "--work", f"{folder}/work", "--report", f"{folder}/report", "--json"]
    # Killed once on the way: what was measured stays.
    first = subprocess.Popen([moiety, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    cells = Path(folder, "work", slug, "short", "cells")
    for _ in range(3000):
        if first.poll() is not None or list(cells.glob("*.json")):
            break
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {p: p.stat().st_mtime_ns for p in cells.glob("*.json")}
    assert kept, f"no cell of {slug} was measured"
    r = run(*words)
    assert r.returncode == 0, r.stderr
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), "a cell was measured twice"
    result = json.loads(r.stdout)
    assert result["verdict"] in ("reproduced", "not reproduced", "inconclusive") and result["reason"] and result["rule"], result
    main = result["metrics"][0]["name"]
    # Arms of a study may measure different things, and a short one may end with a share of 0.
    shown = [a["values"][main]["mean"] for a in result["arms"] if main in a["values"]]
    assert shown and min(shown) >= 0 and max(shown) > 0, result["arms"]
    assert all(a["values"] and all(math.isfinite(v["mean"]) for v in a["values"].values()) for a in result["arms"]), result["arms"]
    assert json.loads(Path(folder, "report", f"{slug}.json").read_text()) == result
    assert slug in Path(folder, "report", f"{slug}.html").read_text()
    print(f"{slug}: {result['verdict']}: {result['headline']}")
sys.exit(0)
