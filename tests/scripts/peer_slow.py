"""llama.cpp loads what `moiety convert` writes and gives the same logits and perplexity. Skipped where llama.cpp is not built."""

import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(root / "tools"))
from peer_perplexity import peer_python

if subprocess.run([peer_python(), "-c", "import llama_cpp"], capture_output=True).returncode != 0:
    print("llama-cpp-python is not installed: tools/setup.sh peer")
    sys.exit(77)
codes = [subprocess.call([sys.executable, str(root / "tools/peer_gguf.py")]),
         subprocess.call([sys.executable, str(root / "tools/peer_perplexity.py"), "--no-transformers", "--bytes", "30000"])]
sys.exit(1 if any(codes) else 0)
