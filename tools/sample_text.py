#!/usr/bin/env python3
"""Writes real English text that every machine with Python has: chapters of the Python language reference, as pydoc carries them.

    python3 tools/sample_text.py OUT.txt [--bytes N]

Prose by people about one subject, with few enough copies on the web that a small model has not learned it by heart (unlike licences).
"""

import argparse
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

CHAPTERS = ("execmodel", "import", "compound", "types", "customization", "comparisons")


def sample(size):
    text = "\n".join(topics[name].strip() + "\n" for name in CHAPTERS if name in topics)
    return text[: text.rfind("\n", 0, size) + 1] if size < len(text) else text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--bytes", type=int, default=90000, help="cut after about so many characters, at the end of a line")
    args = parser.parse_args()
    text = sample(args.bytes)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(text)} characters of the Python language reference, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
