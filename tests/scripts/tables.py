"""The generated parts of README.md are up to date, and the check notices when they are not."""

import json
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(root / "tools"))
import make_tables

readme = (root / "README.md").read_text(encoding="utf-8")
for part in make_tables.PARTS.keys() - {"adapt_step", "cache_types", "peft"}:
    assert f"<!-- begin {part} -->" in readme, f"README.md lost its part {part}"
spoilt = readme.replace("62 systems:", "63 systems:")
assert spoilt != readme and make_tables.render(spoilt, "README.md") != spoilt

for page in (root / "docs/systems").glob("*.md"):
    assert f"<!-- begin study {page.stem} -->" in page.read_text(encoding="utf-8"), f"{page.name} shows no study"

systems = json.loads((root / "docs/systems.json").read_text(encoding="utf-8"))
slugs = [s["slug"] for s in systems]
assert len(slugs) == 62 and slugs == sorted(set(slugs)), "docs/systems.json must hold 62 slugs, sorted, each once"
for s in systems:
    assert s["status"] in ("planned", "started", "done"), s
    assert set(s["kinds"]) <= {"part", "transform", "rule", "policy", "task", "analysis"} and s["kinds"], s
    # A system is done when its page and its measured result are there.
    if s["status"] == "done":
        assert (root / f"docs/systems/{s['slug']}.md").exists() and (root / f"results/systems/{s['slug']}.json").exists(), s

sys.exit(subprocess.call([sys.executable, str(root / "tools/make_tables.py"), "--check"]))
