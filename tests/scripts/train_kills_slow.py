"""A run of a mixture with a balance loss and a bias that moves every step, killed at 20 moments: same log, same weights."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moiety-kills-") as name:
        from pydoc_data.topics import topics
        (Path(name) / "text.txt").write_text("\n\n".join(topics.values())[:60000])
        train.kill_and_resume(Path(name), kills=20, steps=240, least=20)
