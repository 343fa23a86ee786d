"""What `moiety compress` makes of every mixture loads in transformers, and in llama.cpp where that is built (tools/prune_interop.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
if any(importlib.util.find_spec(name) is None for name in ("transformers", "safetensors")):
    print("transformers is not installed: tools/setup.sh parity")
    sys.exit(77)
sys.exit(subprocess.call([sys.executable, str(root / "tools/prune_interop.py")]))
