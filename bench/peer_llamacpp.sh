#!/usr/bin/env bash
# moiety beside llama.cpp on the same files: see peer_llamacpp.py, or --help.
exec python3 "$(dirname "$0")/peer_llamacpp.py" "$@"
