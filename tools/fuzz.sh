#!/usr/bin/env bash
# Fuzzes the readers: tools/fuzz.sh SECONDS [TARGET...]    SECONDS for each target, all of tests/fuzz/ by default.
# Two targets run at a time (JOBS=n changes that). New inputs are kept in build-fuzz/corpus, findings in build-fuzz/findings.
# Executions are added to results/fuzz.json (RECORD=0: not). Exit code 1 when there is a finding.
# A target's own options for libFuzzer stand in its source ("// libFuzzer: ..."); FUZZ_OPTIONS adds more.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?usage: tools/fuzz.sh SECONDS [TARGET...]}
shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  for source in tests/fuzz/fuzz_*.cpp; do
    name=$(basename "$source" .cpp)
    targets+=("${name#fuzz_}")
  done
fi

[ -f build-fuzz/build.ninja ] || cmake --preset fuzz >/dev/null
cmake --build build-fuzz >build-fuzz/build.log 2>&1 || { tail -40 build-fuzz/build.log; exit 1; }

# Short stacks of allocations and a small quarantine make twice as many executions; a finding that is run alone has all.
export ASAN_OPTIONS=malloc_context_size=2:quarantine_size_mb=16

logs=build-fuzz/logs findings=build-fuzz/findings
mkdir -p "$logs" "$findings"
rm -f "$logs"/*

fuzz_one() {
  local target=$1 own=build-fuzz/corpus/$1 seeds=tests/fuzz/corpus/$1 dictionary=tests/fuzz/dict/$1.dict
  local options=()
  read -ra options < <(sed -n 's|^// libFuzzer: ||p' "tests/fuzz/fuzz_$1.cpp" && echo)
  mkdir -p "$own" "$seeds"
  [ -f "$dictionary" ] && options+=("-dict=$dictionary")
  # Files that a target needs are found from the root of the checkout, where this runs.
  if ! nice -n 19 "build-fuzz/bin/fuzz_$target" -max_total_time="$seconds" -rss_limit_mb=512 -malloc_limit_mb=256 -timeout=5 \
    -print_final_stats=1 -artifact_prefix="$findings/$target-" "${options[@]}" ${FUZZ_OPTIONS:-} "$own" "$seeds" >"$logs/$target" 2>&1; then
    # Somebody who stops a run is no finding, nor is an input that was slow only because the machine was busy.
    local slow
    slow=$(sed -n 's/.*Test unit written to \(.*-timeout-.*\)/\1/p' "$logs/$target")
    if [ -n "$slow" ] && "build-fuzz/bin/fuzz_$target" -timeout=5 "$slow" >>"$logs/$target" 2>&1; then
      rm "$slow"
    else
      grep -q "libFuzzer: run interrupted" "$logs/$target" || touch "$logs/$target.failed"
    fi
  fi
}

jobs=${JOBS:-2}
for target in "${targets[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
  fuzz_one "$target" &
done
wait

RECORD=${RECORD:-1} python3 - "$logs" "${targets[@]}" <<'PYTHON'
import json, os, pathlib, re, sys
sys.path.insert(0, "tools")
import machine

logs, targets = pathlib.Path(sys.argv[1]), sys.argv[2:]
now, failed = {}, []
for target in targets:
    text = (logs / target).read_text(errors="replace")
    found = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    # A run that ends with a finding prints its count elsewhere.
    counts = [int(n) for n in re.findall(r"^#(\d+)", text, re.M)]
    now[target] = int(found.group(1)) if found else max(counts, default=0)
    if (logs / (target + ".failed")).exists():
        failed.append(target)
        lines = [line for line in text.splitlines() if not re.match(r"#\d+\s+(NEW|REDUCE|pulse)", line)]
        print(f"---- {target} ----", *lines[-60:], sep="\n")
print(json.dumps({"executions": now, "total": sum(now.values()), "findings": failed}))

if os.environ["RECORD"] != "0":
    path = pathlib.Path("results/fuzz.json")
    record = json.loads(path.read_text()) if path.exists() else {"executions": {}, "total": 0}
    # A total counts executions without a finding since the target last had one.
    for target, count in now.items():
        record["executions"][target] = 0 if target in failed else record["executions"].get(target, 0) + count
    record["executions"] = dict(sorted(record["executions"].items()))
    record["total"] = sum(record["executions"].values())
    record |= machine.stamp()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
sys.exit(1 if failed else 0)
PYTHON
