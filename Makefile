# Two commands do everything, set-up included: `make run` and `make test`. `make` alone lists them all.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Microsoft's telemetry in onnxruntime stays off, and the module keeps its state inside the clone.
export ORT_DISABLE_TELEMETRY := 1
VISIONEDGE_DATA ?= .data

# The first Python of 3.11 to 3.14, for which every locked package has a wheel; else any newer one.
find_python = for p in python3 python3.13 python3.12 python3.14 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && exit; done; \
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo python3
PYTHON ?= $(shell $(find_python))

VARIANT ?= cpu
BASE_IMAGE ?=
IMAGE ?= visionedge:$(VARIANT)
BUILD_FLAGS ?=
UV = uv==0.13.9

.PHONY: help run demo-edge chaos soak recount test test-system test-gpu-libs gpu-check coverage wheel check format bench docs \
	figures image image-test base-digest audit arm-wheels lock setup clean

# Brings .venv up to date for `run` or `dev`; the second time it finds nothing to do.
define prepare
@python='$(PYTHON)'; "$${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "visionedge needs Python 3.11 or newer: install it (Debian: apt-get install python3 python3-venv)" \
	"or name one: make PYTHON=/path/to/python3.12 $@" >&2; exit 1; }; \
	"$$python" tools/prepare.py
endef

help: ## this list
	@echo "visionedge: object detection on camera frames, as an Azure IoT Edge module"
	@echo
	@sed -n 's/^\([a-z-]*\): *## \(.*\)/  make \1	\2/p' Makefile | expand -t 22
	@echo
	@echo '  make run ARGS="--camera dock=rtsp://192.0.2.5/stream1"   your own camera instead of the bundled clip'
	@echo '  make test ARGS="-k batcher -x"                           some of the tests'
	@echo
	@echo "The GPU extra is installed where a usable NVIDIA device is present; VISIONEDGE_EXTRA=cpu|gpu decides otherwise."
	@echo "PyAV decodes, as in the images; its wheel carries GPL code: VISIONEDGE_WITH_AV=0 make run leaves it out."
	@echo "The command itself is .venv/bin/visionedge; \`source .venv/bin/activate\` makes it \`visionedge\`."

run: ## the module: the bundled model on the bundled clip, and where to look
	$(prepare) run
	@VISIONEDGE_DATA='$(VISIONEDGE_DATA)' exec .venv/bin/visionedge run $(ARGS)

demo-edge: ## the module inside a stand-in for IoT Edge, its messages printed, whole with BODIES=1; no hub needed
	$(prepare) dev
	@PYTHONPATH=tests/doubles VISIONEDGE_DATA='$(VISIONEDGE_DATA)' exec .venv/bin/python -m edge_runtime $(if $(BODIES),--bodies) run $(ARGS)

# The tests side by side on all cores; what they write to the temporary folder goes with it.
define run_tests
@folder=$$(mktemp -d) || exit 1; trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	TMPDIR="$$folder" .venv/bin/python $(1) -n auto --dist loadfile
endef

test: ## the quick tests, some minutes on two cores: every part by itself
	$(prepare) dev
	$(call run_tests,-m pytest) -m "not system and not cuda-libs and not exporters" $(ARGS)

test-system: ## the tests that start a whole module, a server or a browser
	$(prepare) dev
	$(call run_tests,-m pytest) -m "system" $(ARGS)

coverage: ## which branches both kinds of tests run through, at least 90 %; a quarter of an hour on two cores
	$(prepare) dev
	$(call run_tests,tools/branch_coverage.py) $(ARGS)

wheel: ## build the wheel, install it into an empty environment of every Python here, try it
	$(prepare) dev
	.venv/bin/python tools/try_wheel.py

test-gpu-libs: export VISIONEDGE_VENV := build/gpu-libs
test-gpu-libs: export VISIONEDGE_EXTRA := gpu
test-gpu-libs: ## the real CUDA libraries (2.7 GB) against a scripted driver; needs a C compiler, no GPU
	$(prepare) dev
	@folder=$$(mktemp -d) || exit 1; trap 'rm -rf "$$folder"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	TMPDIR="$$folder" build/gpu-libs/bin/python -m pytest -m cuda-libs $(ARGS)

gpu-check: ## on an NVIDIA GPU, ten minutes: whether all of it works there; a report to send in build/gpu-check
	$(prepare) dev
	.venv/bin/python tools/gpu_check.py --out build/gpu-check $(ARGS)

chaos: ## stops, hangs, resets and kill -9 against the stand-in: SECONDS=600 SEED=1
	$(prepare) dev
	@PYTHONPATH=module:tests/doubles .venv/bin/python tests/doubles/chaos.py --seconds $(or $(SECONDS),600) --seed $(or $(SEED),1)

soak: ## RTSP servers that die, freeze and change, memory and threads watched: SECONDS=3600
	$(prepare) dev
	@PYTHONPATH=module:tests/doubles .venv/bin/python tests/doubles/soak.py --seconds $(or $(SECONDS),3600)

recount: ## kill -9, another model, a lost device, a reconnect: every scene event is counted again: SECONDS=600
	$(prepare) dev
	@PYTHONPATH=module:tests/doubles .venv/bin/python tests/doubles/recount_run.py --seconds $(or $(SECONDS),600)

check: ## format, lint and types
	$(prepare) dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint Dockerfile.cpu Dockerfile.gpu

format: ## rewrite the sources as `make check` wants them
	$(prepare) dev
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

docs: ## write the tables in docs/ that follow from the code, and the configuration's schema
	$(prepare) dev
	.venv/bin/python tools/write_docs.py

bench: ## how fast this machine is: the pipeline beside a plain loop, ARGS for more
	$(prepare) dev
	@VISIONEDGE_DATA='$(VISIONEDGE_DATA)' .venv/bin/visionedge bench $(if $(ARGS),$(ARGS),pipeline --baseline)

figures: ## all figures of docs/performance.md, on a quiet machine: ARGS="--model mine.onnx --video vtest.avi"
	$(prepare) dev
	@VISIONEDGE_DATA='$(VISIONEDGE_DATA)' .venv/bin/python tools/figures.py $(ARGS)

image: ## the container image: VARIANT=cpu|gpu, BASE_IMAGE=…, IMAGE=name:tag, BUILD_FLAGS="--network host", WITH_PYAV=0 for one without GPL, WITH_OPENVINO=1 for Intel GPUs
	@'$(PYTHON)' tools/build_image.py --variant '$(VARIANT)' --image '$(IMAGE)' --base-image='$(BASE_IMAGE)' \
		--with-pyav='$(WITH_PYAV)' --with-openvino='$(WITH_OPENVINO)' --flags='$(BUILD_FLAGS)'

image-test: ## the image in a hardened container: IMAGE=name:tag, needs a Docker engine; prints the memory it takes
	$(prepare) dev
	VISIONEDGE_TEST_IMAGE='$(IMAGE)' .venv/bin/python -m pytest tests/image -m docker -rs -s $(ARGS)

base-digest: ## look up the digest of the newest Python slim image, for `make image`: requirements/base.txt
	@'$(PYTHON)' tools/base_digest.py $(ARGS)

audit: ## known vulnerabilities in the locks and SBOMs: DATA="folder or zip of OSV records"
	$(prepare) dev
	.venv/bin/python tools/audit.py $(foreach data,$(DATA),--data '$(data)') $(ARGS)

arm-wheels: ## whether every locked package of the CPU image has a wheel for arm64; downloads nothing
	$(prepare) dev
	.venv/bin/python tools/arm_wheels.py

lock: ## make requirements/*.txt anew after a change of a pin (UPGRADE=--upgrade for newer trees)
	@test -x build/uv/bin/uv || { "$(PYTHON)" -m venv build/uv && build/uv/bin/pip install --quiet $(UV); }
	@set -e; compile() { out=$$1; shift; echo "requirements/$$out"; \
		build/uv/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
		--exclude-newer "2 days" --no-emit-index-url --custom-compile-command "make lock" $(UPGRADE) \
		-o requirements/$$out "$$@"; }; \
	compile build.txt requirements/build.in; \
	sed -n 's/^ *"\(av==[^"]*\)".*/\1/p' pyproject.toml | sort -u | compile run-av.txt -; \
	sed -n 's/^ *"\(openvino==[^"]*\)".*/\1/p' pyproject.toml | compile run-openvino.txt --no-deps -; \
	for extra in cpu gpu; do \
		compile run-$$extra.txt pyproject.toml --extra $$extra -c requirements/build.txt; \
		compile dev-$$extra.txt pyproject.toml --extra $$extra --extra eval --extra dev -c requirements/run-$$extra.txt -c requirements/build.txt; \
	done

setup: ## only the set-up for `make test`
	$(prepare) dev

clean: ## remove .venv, the local state in .data, and every cache
	rm -rf .venv .data build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find module tests tools media -name __pycache__ -type d -exec rm -rf {} +
