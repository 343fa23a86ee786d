# Two commands: `make demo` and `make test`. Both do all the set-up and are quick the second time.
BUILD ?= build
PRESET ?= release
PYTHON := .venv/bin/python

.PHONY: demo test test-fast test-asan build setup bench fuzz format clean help

help:
	@echo "make demo       set up, build, run the main job on a real model"
	@echo "make test       set up, build, run every test"
	@echo "make test-fast  only the tests without the label 'slow'"
	@echo "make build      build/bin/moiety, moiety-conform, tests, benchmarks"
	@echo "make fuzz       short fuzz run of every reader (SECONDS_EACH=10)"
	@echo "make test-asan  torch-free tests under ASan and UBSan"

setup:
	@tools/setup.sh

$(BUILD)/build.ninja: CMakeLists.txt CMakePresets.json | setup
	@cmake --preset $(PRESET) -B $(BUILD) -DCMAKE_PREFIX_PATH="$$($(PYTHON) -c 'import torch; print(torch.utils.cmake_prefix_path)')"

build: setup $(BUILD)/build.ninja
	@cmake --build $(BUILD)

demo: build
	@tools/setup.sh models
	@MOIETY=$(BUILD)/bin/moiety tools/demo.sh

test: build
	@tools/setup.sh models parity
	@MOIETY=$(BUILD)/bin/moiety PYTHON=$(PYTHON) ctest --test-dir $(BUILD) --output-on-failure -j2

test-fast: build
	@ctest --test-dir $(BUILD) --output-on-failure -j2 -LE slow

test-asan: setup
	@cmake --preset asan
	@cmake --build build-asan
	@ctest --test-dir build-asan --output-on-failure -j2

fuzz: setup
	@tools/fuzz.sh $${SECONDS_EACH:-10}

format:
	@git ls-files '*.h' '*.cpp' | xargs clang-format-14 -i

clean:
	rm -rf build build-*
