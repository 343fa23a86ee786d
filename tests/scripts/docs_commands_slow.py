"""Runs every ```sh block of README.md and docs/*.md: bash -e, moiety on the path. The blocks of one page run in
order in one folder that is empty at first, as a reader would run them.

The environment variable DOCS_ONLY="info,methods" limits it to these pages.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 300  # seconds a block


def blocks(path):
    """(line of the fence, text) of every ```sh block."""
    start, lines = None, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if start is None and re.fullmatch(r"\s*```sh\s*", line):
            start, lines = number, []
        elif start is not None and re.fullmatch(r"\s*```\s*", line):
            yield start, "\n".join(lines) + "\n"
            start = None
        elif start is not None:
            lines.append(line)
    if start is not None:
        raise SystemExit(f"{path.relative_to(ROOT)}:{start}: the block does not end")


def run(where, text, folder, environment):
    """Runs one block, says how it went, and returns whether it went well."""
    start = time.monotonic()
    # Its own session, so that what a block leaves running ends with it.
    process = subprocess.Popen(["bash", "-e", "-o", "pipefail", "-c", text], cwd=folder, env=environment, text=True,
                               errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=LIMIT)
        verdict = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        verdict = f"still running after {LIMIT} s"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    print(f"{where}: {verdict} ({time.monotonic() - start:.1f} s)", flush=True)
    if verdict != "ok":
        print("    " + text.replace("\n", "\n    ") + "\n" + "\n".join(output.splitlines()[-20:]), flush=True)
    return verdict == "ok"


def main():
    binaries = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve()
    if not (binaries / "moiety").exists():
        sys.exit(f"there is no {binaries / 'moiety'}: build first, or set MOIETY_BIN")
    python = Path(os.environ.get("PYTHON", ROOT / ".venv/bin/python"))
    environment = dict(os.environ, PATH=f"{binaries}:{python.parent}:{os.environ['PATH']}", MOIETY_PYTHON=str(python),
                       VIRTUAL_ENV=str(python.parent.parent))
    only = set(filter(None, os.environ.get("DOCS_ONLY", "").split(",")))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    failures = count = 0
    for page in pages:
        if only and page.stem not in only:
            continue
        with tempfile.TemporaryDirectory(prefix="moiety-docs-") as folder:
            for line, text in blocks(page):
                count += 1
                failures += not run(f"{page.relative_to(ROOT)}:{line}", text, folder, environment)
    print(f"{count} blocks, {failures} failed")
    # A page that lost all its blocks is no success.
    sys.exit(1 if failures or count == 0 else 0)


if __name__ == "__main__":
    main()
