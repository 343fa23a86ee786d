#!/usr/bin/env python3
"""Writes src/moiety/io/unicode_tables.inc: what the `tokenizers` package takes each code point for.

The parts of that package come with Unicode data of different ages (its regex engine, its normalization, its punctuation and
its lowercase disagree on code points assigned after 2016), so no one Unicode library gives its ids everywhere. Every table
here is measured: all code points go through the package and the answers are written as ranges.

    .venv/bin/python tools/unicode_tables.py
"""
import pathlib
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CPS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
ALL = "".join(map(chr, CPS))
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()


def ranges(values):
    out = []
    for c in sorted(values):
        # D7FF and E000 are neighbours among scalar values.
        if out and out[-1][1] in (c - 1, c - 0x801 if c == 0xE000 else -1):
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def matched(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return {c for _, (a, b) in split.pre_tokenize_str(ALL) for c in CPS[a:b]}


def isolated(pre_tokenizer):
    text = "".join("a" + chr(c) for c in CPS)
    return {CPS[a // 2] for _, (a, b) in pre_tokenizer.pre_tokenize_str(text) if b - a == 1 and a % 2}


def removed(normalizer):
    return {c for c in CPS if normalizer.normalize_str(chr(c)) == ""}


def words():
    text = "".join("a" + chr(c) + "a " for c in CPS)
    return {CPS[a // 4] for _, (a, b) in pre_tokenizers.Whitespace().pre_tokenize_str(text) if b - a == 3}


def bert(**on):
    off = dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    return normalizers.BertNormalizer(**{**off, **on})


def table(name, values, note):
    rows = ranges(values)
    return f"// {note}\nconstexpr Range {name}[] = {{\n" + wrap(f"{{0x{a:X}, 0x{b:X}}}" for a, b in rows) + "};\n"


def wrap(items):
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > 118:
            lines.append(line)
            line = "   "
        line += " " + item + ","
    return "\n".join(lines + [line]) + "\n"


def scripts():
    split = pre_tokenizers.UnicodeScripts()

    def together(a, b):
        return len(split.pre_tokenize_str(chr(a) + chr(b))) == 1

    own = [c for c in CPS if not (together(ord("a"), c) and together(0x44F, c))]
    text, leaders, rows = "".join(map(chr, own)), [], []
    for _, (a, b) in split.pre_tokenize_str(text):
        number = next((k for k, c in enumerate(leaders, 1) if together(c, own[a])), None)
        if number is None:
            leaders.append(own[a])
            number = len(leaders)
        rows += [(x, y, number) for x, y in ranges(own[a:b])]
    return rows


def main():
    category = {}
    for name in CATEGORIES:
        for c in matched(rf"\p{{{name}}}+"):
            category[c] = name
    new = {c: k for c, k in category.items() if unicodedata.category(chr(c)) == "Cn"}
    out = [
        f"// Written by tools/unicode_tables.py from tokenizers {tokenizers.__version__}; do not edit.\n",
        f"// Code points assigned after Unicode {unicodedata.unidata_version}, with their general category.\n"
        "constexpr CategoryRange kNewCodePoints[] = {\n",
    ]
    rows = [(a, b, k) for k in CATEGORIES for a, b in ranges(c for c in new if new[c] == k)]
    out.append(wrap(f"{{0x{a:X}, 0x{b:X}, \"{k}\"}}" for a, b, k in sorted(rows)) + "};\n")
    out.append(table("kNewHan", {c for c in matched(r"\p{Han}+") if c in new}, "Those of script Han."))
    out.append(table("kWord", words(), "Word characters: \\w of the Whitespace pre-tokenizer and of single_word."))
    out.append(table("kNumeric", isolated(pre_tokenizers.Digits(individual_digits=True)), "Digits pre-tokenizer."))
    out.append(table("kPunctuation", isolated(pre_tokenizers.Punctuation()), "Punctuation and BERT pre-tokenizers."))
    out.append(table("kControl", removed(bert(clean_text=True)), "Dropped by the BERT normalizer's clean_text."))
    out.append(table("kNonspacingMark", removed(bert(strip_accents=True)), "Dropped by its strip_accents."))
    out.append(table("kCombiningMark", removed(normalizers.StripAccents()), "Dropped by StripAccents."))

    lower = {c: normalizers.Lowercase().normalize_str(chr(c)) for c in CPS}
    odd = {c: ord(t) - c for c, t in lower.items() if t != chr(c).lower() and len(t) == 1}
    rows = []
    for c in sorted(odd):
        if rows and rows[-1][1] == c - 1 and rows[-1][2] == odd[c]:
            rows[-1][1] = c
        else:
            rows.append([c, c, odd[c]])
    out.append(f"// Lower case that Unicode {unicodedata.unidata_version} does not have: first, last, distance.\n"
               "constexpr LowerRange kNewLower[] = {\n" + wrap(f"{{0x{a:X}, 0x{b:X}, {d}}}" for a, b, d in rows) + "};\n")

    inert = {0x11935, 0x11930}
    forms = [(f, getattr(normalizers, f)()) for f in ("NFD", "NFC", "NFKD", "NFKC")]
    nfd = forms[0][1]
    for c in CPS:
        ch = chr(c)
        probes = ("a" + ch + "\u05b0", "a\u0345" + ch, "a" + ch + "\u0301" + ch + "\u0316", "a\u0315" + ch)
        if any(n.normalize_str(ch) != unicodedata.normalize(f, ch) for f, n in forms) or any(
                nfd.normalize_str(t) != unicodedata.normalize("NFD", t) for t in probes):
            inert.add(c)
    out.append(table("kInert", inert, "Code points that its normalization leaves alone and takes for starters."))
    out.append("// Classes of the UnicodeScripts pre-tokenizer; what is not here goes with any neighbour.\n"
               "constexpr ScriptRange kScripts[] = {\n" + wrap(f"{{0x{a:X}, 0x{b:X}, {k}}}" for a, b, k in scripts()) + "};\n")
    path = pathlib.Path(__file__).resolve().parent.parent / "src/moiety/io/unicode_tables.inc"
    path.write_text("\n".join(out))
    print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
