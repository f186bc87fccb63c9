# make quickstart | scenes | test | check | format | test-slow | test-gpu | clean
# Each target first makes .venv and installs into it what it needs, once.

SHELL := /bin/bash
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: quickstart scenes test check format test-slow test-gpu clean system-packages

PY := .venv/bin/python
PIP := DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt

# Programs that some tests need; without them those tests skip, and fail where CI=true.
SYSTEM_PACKAGES := openssh-server pdsh chromium

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# --- what it is for ---------------------------------------------------------------------------

# A complete run on a CPU: clips, shards, manifest, training on two processes, evaluation.
quickstart: export DS_ACCELERATOR := cpu
quickstart: .venv/.runtime
	rm -rf data/quickstart runs/quickstart
	$(PY) tools/make_quickstart_data.py --output data/quickstart
	$(PY) tools/precompute.py video --annotations data/quickstart/train.jsonl --output data/quickstart/shards/train --size 32
	$(PY) tools/precompute.py video --annotations data/quickstart/eval.jsonl --output data/quickstart/shards/eval --size 32
	$(PY) tools/validate_shards.py data/quickstart/shards/train data/quickstart/shards/eval --allow content
	$(PY) tools/build_manifest.py data/quickstart/shards/train --tokenizer data/quickstart/tokenizer --output data/quickstart/train.parquet
	$(PY) tools/build_manifest.py data/quickstart/shards/eval --tokenizer data/quickstart/tokenizer --output data/quickstart/eval.parquet
	deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero2.json --recipe recipes/quickstart.yaml
	$(PY) launch/evaluate.py --run runs/quickstart

# Prefix, then the perceiver's two stages, on images of one shape each, judged with blank and shuffled ones.
scenes: export DS_ACCELERATOR := cpu
scenes: .venv/.runtime
	rm -rf data/scenes runs/scenes_*
	$(PY) tools/make_scenes_data.py --output data/scenes
	for set in captions_train captions_eval questions_train questions_eval texts_train; do \
	  $(PY) tools/precompute.py video --annotations data/scenes/$$set.jsonl --output data/scenes/shards/$$set --size 32 && \
	  $(PY) tools/build_manifest.py data/scenes/shards/$$set --tokenizer data/scenes/tokenizer --output data/scenes/$$set.parquet || exit; \
	done
	$(PY) launch/train.py --ds_config ds_configs/zero2.json --recipe recipes/scenes/language.yaml
	$(PY) tools/merge_adapter.py runs/scenes_language/checkpoints/step_00000600/model data/scenes/language --part language
	$(PY) launch/train.py --ds_config ds_configs/zero2.json --recipe recipes/scenes/prefix.yaml
	$(PY) launch/evaluate.py --run runs/scenes_prefix
	$(PY) tools/merge_adapter.py runs/scenes_prefix/checkpoints/$$(cat runs/scenes_prefix/checkpoints/best)/model data/scenes/tower --part vision
	for run in perceiver_stage1 perceiver_stage2; do \
	  $(PY) launch/train.py --ds_config ds_configs/zero2.json --recipe recipes/scenes/$$run.yaml && \
	  $(PY) launch/evaluate.py --run runs/scenes_$$run || exit; \
	done

test: .venv/.dev system-packages
	$(PY) -m pytest -n 2 --dist loadfile -m "not gpu and not slow"

test-slow: .venv/.dev
	$(PY) -m pytest -m slow

test-gpu: .venv/.dev
	DS_ACCELERATOR=cuda $(PY) -m pytest -m gpu

check: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vlm launch tools

format: .venv/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Leaves .venv, data and runs alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------

# torch first and by itself: what needs torch then finds this one and brings no other build.
.venv/.runtime: $(SOURCES) | $(PY)
	@echo "Installing into .venv; the first time takes some minutes"
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# PYTHON=... chooses another interpreter. Debian and Ubuntu ship Python without its venv.
$(PY):
	@set -e; found=; fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c "$$fits" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: found no Python 3.11, 3.12 or 3.13; install one or set PYTHON=..." >&2; exit 2; \
	fi; \
	if ! "$$found" -c 'import ensurepip' 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; \
	  else \
	    echo "error: $$found has no venv; on Debian run: apt-get install python3-venv" >&2; exit 2; \
	  fi; \
	fi; \
	"$$found" -m venv .venv || { rm -rf .venv; exit 1; }

system-packages:
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0; \
	missing=; \
	for package in $(SYSTEM_PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	    || missing="$$missing $$package"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	echo "Installing$$missing"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null \
	  || { echo "could not install$$missing; tests that need them will skip" >&2; [ "$$CI" != true ]; }
