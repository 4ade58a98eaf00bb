# `make demo` and `make test` set up their own environment in .venv; nothing else is needed than
# Python 3.10 or later. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := dist/demo

.PHONY: help demo test test-all lint train-demo web-tools windows-tools mlc-tools clean

help:
	@echo "make demo       build the bundled model for this machine and chat with it"
	@echo "make test       run the tests"
	@echo "make test-all   run all tests, the slow ones too"
	@echo "make lint       check style"
	@echo "make web-tools  install WebLLM and Playwright from npm into the user's cache"
	@echo "make windows-tools  unpack TVM's runtime for Windows into the user's cache, for tests"
	@echo "make mlc-tools  build MLC's engine from its sources into the user's cache, for tests"
	@echo "make train-demo train the bundled model again (about 45 minutes on 2 cores)"

# The core alone: no torch, about 150 MB to download.
$(VENV)/.core: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

# Tests compare with PyTorch. A build for CPUs is enough and much smaller where one is offered.
$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints-test.txt
	@touch $@

demo: $(VENV)/.core
	$(BIN)/fairy_compile build examples/bundled/model --target cpu -o $(DEMO) --force
	$(BIN)/fairy_compile chat $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 -m 'slow or not slow'

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What `fairy_compile serve --web` hands to browsers, and what drives one in tests.
WEB_TOOLS = $(shell $(BIN)/python -c 'from fairy_compile.user_cache import *; print(cache_directory() / "web")')
web-tools: $(VENV)/.core
	mkdir -p '$(WEB_TOOLS)'
	cp examples/web/package.json '$(WEB_TOOLS)'
	npm install --prefix '$(WEB_TOOLS)' --no-audit --no-fund

# TVM's runtime for Windows, for tests under Wine. Its C++ runtime library comes with it.
WINDOWS_TOOLS = $(shell $(BIN)/python -c 'from fairy_compile.user_cache import *; print(cache_directory() / "windows")')
TVM_WHEELS = $(shell $(BIN)/python -c 'from fairy_compile.tvm_pair import *; print(*map("==".join, TVM_PAIR.items()))')
windows-tools: $(VENV)/.core
	rm -rf '$(WINDOWS_TOOLS)'
	mkdir -p '$(WINDOWS_TOOLS)'
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --platform win_amd64 \
	  --python-version 312 -d '$(WINDOWS_TOOLS)' $(TVM_WHEELS)
	cd '$(WINDOWS_TOOLS)' && for wheel in *.whl; do $(PYTHON) -m zipfile -e $$wheel $$wheel.unpacked; done
	find '$(WINDOWS_TOOLS)' -type f ! -name '*.dll' -delete
	find '$(WINDOWS_TOOLS)' -name 'tvm_compiler.dll' -delete

# MLC's engine for tests, linked with the runtime of TVM's wheel. It needs git, CMake and a C++
# compiler, and minutes. Its tokenizers are those of Python, so no Rust is compiled. Sources that are
# there are taken as they are.
MLC_TOOLS = $(shell $(BIN)/python -c 'from tests.mlc.installed import *; print(tools())')
MLC_COMMIT := 79d603f0
MLC_MODULES := stb tokenizers-cpp tvm xgrammar
SITE = $(shell $(BIN)/python -c 'import tvm; print(tvm.__path__[0].removesuffix("/tvm"))')
mlc-tools: $(VENV)/.test
	test -d '$(MLC_TOOLS)/mlc-llm' || \
	  git clone --no-checkout https://github.com/mlc-ai/mlc-llm '$(MLC_TOOLS)/mlc-llm'
	test -d '$(MLC_TOOLS)/mlc-llm/cpp' || ( cd '$(MLC_TOOLS)/mlc-llm' && \
	  git checkout --quiet $(MLC_COMMIT) && \
	  git submodule update --init --depth 1 $(addprefix 3rdparty/,$(MLC_MODULES)) )
	$(BIN)/pip install --quiet --upgrade --no-deps --target '$(MLC_TOOLS)/packages' \
	  shortuuid prompt_toolkit wcwidth requests urllib3 charset_normalizer
	cmake -S tests/mlc -B '$(MLC_TOOLS)/build' -DMLC_LLM='$(MLC_TOOLS)/mlc-llm' -DSITE='$(SITE)'
	cmake --build '$(MLC_TOOLS)/build' --parallel

train-demo: $(VENV)/.test
	$(BIN)/python examples/bundled/train.py -o dist/bundled

clean:
	rm -rf dist build *.egg-info
