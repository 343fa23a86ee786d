#!/usr/bin/env bash
# The frame of the command line: help, version, wrong use, errors in text and JSON, closed pipes.
set -uo pipefail
moiety="${MOIETY_BIN:?}/moiety"
failures=0
fail() { echo "FAIL: $*"; failures=$((failures + 1)); }

# expect CODE PATTERN COMMAND...: exit code, and stdout and stderr together match the pattern.
expect() {
  local code=$1 pattern=$2 out got
  shift 2
  out=$("$@" 2>&1)
  got=$?
  [ "$got" = "$code" ] || fail "$*: exit code $got, not $code: $out"
  grep -qE -- "$pattern" <<<"$out" || fail "$*: no /$pattern/ in: $out"
}

expect 0 '^moiety [0-9]+\.[0-9]+\.[0-9]+$' "$moiety" --version
expect 0 '^VERBS' "$moiety" --help
expect 0 '^EXAMPLES' "$moiety" --help
expect 2 'Usage: moiety VERB' "$moiety"
expect 2 'unknown verb `metods`; did you mean `methods`\?' "$moiety" metods
expect 2 'unknown option `--versoin`; did you mean `--version`\?' "$moiety" --versoin
expect 2 'unknown option --jsno; did you mean `--json`\?' "$moiety" methods --jsno
expect 2 'unexpected argument' "$moiety" methods one two
expect 2 'excludes' "$moiety" methods --json --markdown
expect 0 '^EXAMPLES' "$moiety" methods --help
expect 2 'unknown `routin`; did you mean `routing`' "$moiety" analyze routin x
expect 2 'say which: routing' "$moiety" analyze
expect 2 'unknown option --tex; did you mean `--text`' "$moiety" analyze routing x --tex a
expect 1 'there is no method `no-such-method`' "$moiety" methods no-such-method

expect 1 "'lots' is not a number of parameters" "$moiety" make-model --family llama --params lots -o m.gguf
expect 1 "'lama' is not supported; did you mean " "$moiety" make-model --family lama --params 100M -o m.gguf
expect 1 'say how large' "$moiety" make-model --family llama -o m.gguf
expect 1 'which --family' "$moiety" make-model --params 100M -o m.gguf
expect 1 'not KEY=VALUE' "$moiety" make-model --family llama --params 100M --set hidden -o m.gguf
expect 1 'not a multiple of 128' "$moiety" make-model --family llama --params 100M --hidden 100 -o m.gguf
expect 0 'would write m.gguf: qwen3_moe, [0-9.]+M' "$moiety" make-model --family qwen3_moe --params 300M --format q4_0 -o m.gguf --dry-run
[ ! -e m.gguf ] || fail "make-model wrote a file after all"
expect 2 'not in range' "$moiety" bench nothing -b 0
for verb in generate chat bench eval; do
  expect 2 '--cache-type-v: q4_0 not in \{' "$moiety" "$verb" nothing --cache-type-v q4_0
done
expect 1 'nothing: no such file or folder' "$moiety" bench nothing

# Every verb: help with examples; verbs are sorted.
verbs=$("$moiety" --help | sed -n '/^VERBS/,/^$/p' | awk 'NR > 1 && NF {print $1}')
[ -n "$verbs" ] || fail "no verbs in the help"
[ "$verbs" = "$(sort <<<"$verbs")" ] || fail "verbs are not sorted: $verbs"
for verb in $verbs; do
  expect 0 "moiety $verb" "$moiety" "$verb" --help
  expect 0 '^EXAMPLES' "$moiety" "$verb" --help
done

# With --json the error is on stdout, as JSON, too.
out=$("$moiety" methods no-such-method --json 2>/dev/null) && fail "--json: exit code 0 for an error"
"${PYTHON:-python3}" -c 'import json, sys; assert "no-such-method" in json.loads(sys.argv[1])["error"]' "$out" || fail "no JSON error: $out"

# A reader that goes away ends the program quietly; a full disk is an error.
"$moiety" --help 2>pipe_error.$$ | true
[ -s pipe_error.$$ ] && fail "a closed pipe is not quiet: $(cat pipe_error.$$)"
rm -f pipe_error.$$
[ -w /dev/full ] && { "$moiety" --help >/dev/full 2>/dev/null && fail "a full disk is not noticed"; }

# Quick to start: the program with all of torch (a loose limit, for busy machines; about 0.25 s on an idle one).
start=$(date +%s%N)
"$moiety" --version >/dev/null
took=$((($(date +%s%N) - start) / 1000000))
[ "$took" -lt 5000 ] || fail "--version took $took ms"
exit $((failures > 0))
