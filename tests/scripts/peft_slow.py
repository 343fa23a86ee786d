"""Adapters between moiety and PEFT, both ways (tools/peft_interop.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
if any(importlib.util.find_spec(name) is None for name in ("transformers", "peft", "safetensors")):
    print("peft is not installed: tools/setup.sh parity")
    sys.exit(77)
sys.exit(subprocess.call([sys.executable, str(root / "tools/peft_interop.py")]))
