"""All families against transformers: single, padded, cached, and through GGUF (tools/parity.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
if any(importlib.util.find_spec(name) is None for name in ("transformers", "sentence_transformers", "safetensors")):
    print("transformers is not installed: tools/setup.sh parity")
    sys.exit(77)
sys.exit(subprocess.call([sys.executable, str(root / "tools/parity.py"), "--gguf", "--jobs", "2"]))
