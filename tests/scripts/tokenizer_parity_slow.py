#!/usr/bin/env python3
"""Runs tools/tokenizer_parity.py with the built moiety over a part of its corpus that takes a few minutes."""
import os
import pathlib
import subprocess
import sys

try:
    import gguf, sentencepiece, tokenizers  # noqa: E401,F401
except ImportError as e:
    print(f"skipped: {e}; `tools/setup.sh parity` installs it")
    sys.exit(77)
root = pathlib.Path(__file__).resolve().parent.parent.parent
moiety = pathlib.Path(os.environ["MOIETY_BIN"]) / "moiety"
sys.exit(subprocess.run([sys.executable, root / "tools/tokenizer_parity.py", "--moiety", moiety, "--lines", "4000"]).returncode)
