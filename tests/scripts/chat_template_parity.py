#!/usr/bin/env python3
"""Chat templates against transformers, with a few thousand random expressions that are not committed."""
import pathlib
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parents[2]
sys.exit(subprocess.run([sys.executable, root / "tools" / "chat_template_parity.py", "--random", "3000", "--seed", "7"]).returncode)
