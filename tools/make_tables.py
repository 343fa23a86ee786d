#!/usr/bin/env python3
"""Writes the generated parts of README.md and docs/systems/*.md from docs/systems.json and results/.

    python3 tools/make_tables.py           rewrite them
    python3 tools/make_tables.py --check   exit code 1 when one is out of date

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Numbers come from result files only, which say on
what machine and when they were measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    file = ROOT / path
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def where(record):
    m = record["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {record['date']}"


def systems():
    """One row a system; `result` is the headline of its study's result file, once there is one."""
    rows = load("docs/systems.json")
    count = {s: sum(r["status"] == s for r in rows) for s in ("done", "started", "planned")}
    lines = [f"{len(rows)} systems: " + ", ".join(f"{n} {s}" for s, n in count.items() if n) + ".", "",
             "| slug | system | kind | paper | status | measured |", "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        page = ROOT / f"docs/systems/{r['slug']}.md"
        slug = f"[`{r['slug']}`](docs/systems/{r['slug']}.md)" if page.exists() else f"`{r['slug']}`"
        paper = f"[{r['arxiv']}](https://arxiv.org/abs/{r['arxiv']})" if r["arxiv"] else ""
        result = load(f"results/systems/{r['slug']}.json")
        measured = f"{result['headline']} ({where(result)})" if result else ""
        lines.append(f"| {slug} | {r['title']} | {', '.join(r['kinds'])} | {paper} | {r['status']} | {measured} |")
    return lines


def perplexity():
    record = load("results/perplexity.json")
    if not record:
        return ["Not measured yet: `python3 tools/peer_perplexity.py --write`."]
    lines = ["| model | moiety | the same weights in f32 | llama.cpp | moiety against f32 | llama.cpp against f32 |",
             "| --- | --- | --- | --- | --- | --- |"]
    for m in record["models"]:
        runs = m["runs"]

        def number(name):
            return f"{runs[name]['perplexity']:.3f}" if name in runs else ""

        def against(name):
            return f"{100 * (runs[name]['perplexity'] / runs['moiety f32']['perplexity'] - 1):+.3f} %" if name in runs else ""

        lines.append(f"| {m['name']} | {number('moiety')} | {number('moiety f32')} | {number('llama.cpp')} | {against('moiety')} | {against('llama.cpp')} |")
    t, scored = record["text"], sorted({m["runs"]["moiety"]["scored"] for m in record["models"]})
    lines += ["", f"{t['source']}, {t['bytes']} bytes, {' and '.join(str(n) for n in scored)} tokens scored, windows of {record['context']} tokens ({record['method']}); {where(record)}."]
    return lines


def parity():
    record = load("results/parity.json")
    if not record:
        return ["Not measured yet: `python3 tools/parity.py --gguf --json FILE`."]
    s = record["summary"]
    families = {}
    for r in record["results"]:
        if not r.get("extra"):
            families.setdefault(r["family"], []).append(r)
    lines = ["| family | checkpoints | agree | largest difference, f32 |", "| --- | --- | --- | --- |"]
    for family, rows in sorted(families.items()):
        worst = max((r[k] for r in rows for k in ("single", "left", "right", "cache1", "cache3", "gguf") if r.get(k) is not None), default=None)
        lines.append(f"| {family} | {len(rows)} | {sum(r['passed'] for r in rows)} | {'' if worst is None else f'{worst:.1e}'} |")
    lines += ["", f"transformers {s['transformers']}, torch {s['torch']}; {where(record)}."]
    return lines


def load_time():
    record = load("results/load.json")
    if not record:
        return ["Not measured yet: `python3 tools/load_time.py --write`."]
    lines = ["| model | best | median | processor time |", "| --- | --- | --- | --- |"]
    for m in [*record["models"], {"name": "the program alone (`--version`)", **record["start"]}]:
        lines.append(f"| {m['name']} | {m['best_s']:.2f} s | {m['median_s']:.2f} s | {m['cpu_s']:.2f} s |")
    lines += ["", f"{record['runs']} runs each; {where(record)}."]
    return lines


def study(slug):
    """What `moiety reproduce SLUG --budget full` found."""
    r = load(f"results/systems/{slug}.json")
    if not r and not (ROOT / "studies" / (slug.replace("-", "_") + ".cpp")).exists():
        return ["There is no study of it yet."]
    if not r:
        return [f"Not measured yet: `moiety reproduce {slug} --budget full --report results/systems`."]

    def number(value, digits):
        return f"{value['mean']:.{digits}f}" + (f" ± {value['spread']:.{digits}f}" if value["seeds"] > 1 else "")

    metrics = [m for m in r["metrics"] if any(m["name"] in a["values"] for a in r["arms"])]
    lines = [f"**Claim.** {r['claim']}", "", f"**Here.** {r['setup']}", "", f"**Rule, written before the run.** {r['rule']}", "",
             "| arm | what it is | " + " | ".join(m["text"] for m in metrics) + " |", "| --- | --- |" + " --- |" * len(metrics)]
    for a in r["arms"]:
        cells = [number(a["values"][m["name"]], m["digits"]) if m["name"] in a["values"] else "" for m in metrics]
        lines.append(f"| `{a['name']}` | {a['text']} | " + " | ".join(cells) + " |")
    seeds = r["budget"]["seeds"]
    steps = f"{r['budget']['steps']} steps, " if r["budget"]["steps"] else ""  # none where nothing but shared bases is trained
    lines += ["", f"**Verdict: {r['verdict']}.** {r['reason']}", "",
              f"{seeds} seed{'' if seeds == 1 else 's'} (mean ± standard deviation), {r['budget']['name']} budget, {steps}"
              f"cells of one thread took {r['cell_seconds'] / 60:.0f} minutes in all, beside other work; torch {r['versions']['torch']}; {where(r)}."]
    return lines


def moe_layer():
    record = load("results/moe_layer.json")
    if not record:
        return ["Not measured yet: `python3 bench/side_by_side_moe.py --write`."]
    lines = ["| type | experts | a step | of a dense layer's speed | of the peak; eager | against eager | against grouped_mm | and its memory kept | memory, theirs |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in record["results"]:
        def times(name):
            return f"{r['ratios'][name]:.2f}x" if name in r["ratios"] else ""

        lines.append(f"| {r['dtype']} | {r['experts']} | {r['seconds'] * 1e3:.0f} ms | {r['of_dense']:.2f} | {r['of_peak']:.2f}; {r['of_peak'] / r['ratios']['eager']:.2f} | {times('eager')} | "
                     f"{times('grouped_mm')} | {times('kept')} | {r['memory_mib']:.0f} MiB, {r['peers'][r['fastest_peer']]['memory_mib']:.0f} MiB |")
    lines += ["", f"Forward and backward: hidden {record['hidden']}, expert width {record['width']}, {record['tokens']} tokens, {record['chosen']} experts a token; "
              f"best of {record['rounds']} round{'s' if record['rounds'] > 1 else ''}; transformers {record['transformers']}, torch {record['torch']}; {where(record)}."]
    return lines


def train_step():
    record = load("results/train_step.json")
    if not record:
        return ["Not measured yet: `python3 bench/side_by_side_train.py --write`."]
    tokens = record["batch"] * record["length"]
    lines = ["| type | moiety | transformers, eager | transformers, grouped_mm | of the fastest product |", "| --- | --- | --- | --- | --- |"]
    for r in record["results"]:
        def peer(name):
            p = r["peers"].get(name, {})
            return f"{tokens / p['seconds']:.0f} tokens/s ({r['ratios'][name]:.2f}x)" if "seconds" in p else ""

        reached = f"{100 * r['of_peak']:.0f} % of {r['peak_gflops']:.0f} GFLOP/s" if "of_peak" in r else ""
        lines.append(f"| {r['dtype']} | {r['tokens_per_second']:.0f} tokens/s | {peer('eager')} | {peer('grouped_mm')} | {reached} |")
    c = record["config"]
    lines += ["", f"A Mixtral of {c['num_hidden_layers']} layers, hidden {c['hidden_size']}, {c['num_local_experts']} experts of width {c['intermediate_size']}, "
              f"{tokens} tokens a step, AdamW, clipped gradients; in brackets how much faster moiety is; transformers {record['transformers']}, torch {record['torch']}; {where(record)}."]
    return lines


def speed():
    record = load("results/speed.json")
    if not record:
        return ["Not measured yet: `bench/peer_llamacpp.sh --standard --write`."]
    lines = ["| model | test | moiety | llama.cpp | ratio | of the limit |", "| --- | --- | --- | --- | --- | --- |"]
    for m in record["models"]:
        for r in m["results"]:
            test = f"{'prompt of' if r['test'] == 'prompt' else 'generate'} {r['tokens']}" + (f", {r['batch']} sequences" if r["batch"] > 1 else "")
            limit = ""
            if "gigabytes_per_second" in r:
                limit = f"{r['gigabytes_per_second']:.1f} of {r['bandwidth_gigabytes_per_second']:.1f} GB/s"
            elif "gflops" in r:
                limit = f"{r['gflops']:.0f} of {r['peak_gflops']:.0f} Gop/s"
            lines.append(f"| {m['name']} | {test} | {r['moiety']:.1f} | {r['llama_cpp']:.1f} ({r['layout']}) | {r['ratio']:.2f}x | {limit} |")
    lines += ["", f"Tokens a second, the best of {record['rounds']} rounds with {record['threads']} threads; llama.cpp by llama-cpp-python "
              f"{record['llama_cpp_python']}, the faster of its two layouts; {where(record)}."]
    return lines


def offload():
    record = load("results/offload.json")
    if not record:
        return ["Not measured yet: `python3 bench/offload.py --write`."]

    def spread(r, key, show):
        least, most = r["spread"][key]
        return f"{show(r[key])} ({show(least)} to {show(most)})"

    lines = ["| run | tokens/s | experts in memory | read | of the disk's limit | at most resident | lossless |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, r in record["runs"].items():
        if "error" in r:
            lines.append(f"| {name} | {r['error']} |  |  |  |  |  |")
            continue
        lossless = "yes" if r["lossless"] else f"no: {100 * r['altered_share']:.1f} % in low precision or left out"
        lines.append(f"| {name} | {spread(r, 'tokens_per_second', lambda x: f'{x:.2f}')} | {100 * r['hit_rate']:.1f} % | {r['bytes_read'] / 1e9:.2f} GB | "
                     f"{spread(r, 'of_disk', lambda x: f'{100 * x:.0f} %')} | {r['peak_resident'] / 2**20:.0f} MiB | {lossless} |")
    peer = record["llama_cpp"]
    if peer:
        lines.append(f"| llama.cpp, mapped file | {peer['error'] if 'error' in peer else format(peer['tokens_per_second'], '.2f')} |  |  |  |  | yes |")
    good = [r for r in record["runs"].values() if "error" not in r]
    best = max((r["tokens_per_second"] for r in good if r["lossless"]), default=0.0)
    against, version = "", ""
    if peer and "tokens_per_second" in peer and best:
        against = f" The fastest lossless run is {best / peer['tokens_per_second']:.1f} times as fast as llama.cpp."
        version = f"Llama-cpp-python {peer['version']}" + (f", measured {peer['date']}" if peer["date"] != record["date"] else "") + "; "
    rates = [bound * 1e-6 for r in good for bound in r["spread"]["disk_bytes_per_second"]]
    lines += ["", f"{record['model']}, {record['bytes'] / 1e9:.2f} GB: {record['times']:.1f} times the {record['memory'] / 2**20:.0f} MiB that a control group allows; "
              f"{record['tokens']} tokens behind a short prompt, {record['threads']} threads, the file not in the page cache at first; medians of {record['rounds']} rounds and what "
              f"they lie between. The disk's limit is the time that all bytes that were read take at the speed that the disk has directly before and after the run: "
              f"{min(rates):.0f} to {max(rates):.0f} MB/s.{against} {version}{where(record)}."]
    return lines


def cache_types():
    record = load("results/cache_types.json")
    if not record:
        return ["Not measured yet: `python3 bench/cache_types.py --write`."]
    depths = sorted({r["depth"] for r in record["results"]})
    exact = record["perplexity"]["f32"]["perplexity"]
    lines = ["| kept as | " + " | ".join(f"behind {d} tokens" if d else "from the start" for d in depths) + f" | memory behind {depths[-1]} | perplexity |",
             "| --- | " + " | ".join("---" for _ in depths) + " | --- | --- |"]
    for name, p in record["perplexity"].items():
        rows = {r["depth"]: r for r in record["results"] if r["type"] == name}
        speeds = " | ".join(f"{rows[d]['tokens_per_second']:.1f} tokens/s" if name == "f32" else f"{rows[d]['ratio']:.2f}x" for d in depths)
        change = "" if name == "f32" else f" ({100 * (p['perplexity'] / exact - 1):+.3f} %)"
        lines.append(f"| {name} | {speeds} | {rows[depths[-1]]['cache_bytes'] / 2**20:.1f} MiB | {p['perplexity']:.4f}{change} |")
    lines += ["", f"{record['model']}, generating {record['tokens']} tokens with {record['threads']} thread{'s' if record['threads'] > 1 else ''}: of f32 the best of {record['rounds']} rounds, of the "
              f"others the median of the ratios to f32 in the same round; perplexity of {record['perplexity']['f32']['tokens']} tokens in windows of {record['context']} that read what the cache keeps, with weights in f32; {where(record)}."]
    return lines


def adapt_step():
    record = load("results/adapt_step.json")
    if not record:
        return ["Not measured yet: `python3 bench/side_by_side_adapt.py --write`."]
    names = {"lora": "LoRA, against PEFT", "mola": f"{record['chosen']} of {record['experts']} LoRA experts, against eager torch"}
    lines = ["| what | type | moiety | peer | ratio | memory | of the peer's |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for r in record["results"]:
        lines.append(f"| {names[r['method']]} | {r['dtype']} | {r['moiety']['tokens_per_second']:.0f} tokens/s | {r['peer']['tokens_per_second']:.0f} tokens/s | "
                     f"{r['ratio']:.2f}x | {r['moiety']['memory_mib']:.0f} MiB | {r['memory_ratio']:.2f}x |")
    lines += ["", f"{record['model']}, all matrices, rank {record['rank']}, {record['batch']} rows of {record['length']} tokens a step; best step of {record['rounds']} "
              f"round{'s' if record['rounds'] > 1 else ''}; PEFT {record['peft']}, transformers {record['transformers']}, torch {record['torch']}; {where(record)}."]
    return lines


def peft():
    record = load("results/peft.json")
    if not record:
        return ["Not measured yet: `python3 tools/peft_interop.py --out results/peft.json`."]
    lines = ["| case | model | from PEFT | to PEFT | merged, in transformers | over GGUF |", "| --- | --- | --- | --- | --- | --- |"]
    for r in record["results"]:
        values = [f"{r[k]:.0e}" if r.get(k) is not None else "" for k in ("from_peft", "to_peft", "merged", "gguf_base")]
        lines.append(f"| {r['case']} | {r['model']} | " + " | ".join(values) + " |")
    lines += ["", f"Largest difference of logits, of unit scale; PEFT {record['peft']}, transformers {record['transformers']}; {where(record)}."]
    return lines


PARTS = {"cache_types": cache_types, "adapt_step": adapt_step, "peft": peft, "systems": systems, "offload": offload, "speed": speed, "perplexity": perplexity, "parity": parity, "load": load_time, "moe": moe_layer, "train": train_step}


def render(text, name):
    def replace(match):
        part, _, slug = match.group(2).partition(" ")
        if part == "study" and slug:
            lines = study(slug)
        elif part in PARTS:
            lines = PARTS[part]()
        else:
            sys.exit(f"{name}: no generated part is called {part} (there are {', '.join(PARTS)} and study SLUG)")
        return match.group(1) + "\n".join(lines) + "\n" + match.group(3)

    return re.sub(r"(<!-- begin ([a-z_]+(?: [a-z0-9-]+)?) -->\n).*?(<!-- end \2 -->)", replace, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for name in ["README.md", "docs/adapters.md", "docs/bench.md", "docs/offload.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs/systems").glob("*.md")))]:
        old = (ROOT / name).read_text(encoding="utf-8")
        new = render(old, name)
        if new != old and args.check:
            stale += 1
            print(f"{name} is out of date: run python3 tools/make_tables.py", file=sys.stderr)
        elif new != old:
            (ROOT / name).write_text(new, encoding="utf-8")
            print(f"{name} rewritten")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
