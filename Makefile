# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := outputs/demo
ACTIVATE := For commands of your own: . $(VENV)/bin/activate
# A test needs no more than one core: as many at a time as there are, eight at most.
PARALLEL := -n $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8))) --dist worksteal

PEERS := outputs/peers
OLDEST := .venv-oldest

# Commands and tests start many processes: where no bytecode may be kept each of them compiles its libraries again, 20 s a process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: docs quickstart zoo step-count wheel latency study results results-quick gpu-bench step-time help setup demo demo-seeds golden-deviations stress models-page transformers-page settings-page search-cost weights-figures test test-cpus test-fast test-long test-gpu test-slurm system-packages check lint types imports clean test-oldest

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

setup: $(READY) ## create .venv with all extras (downloads several GB of wheels)

# Of what pip prints: packages of 10 MB and more.
LARGE_PACKAGES := grep --line-buffered -oE "(Downloading|Using cached) [^ ]+ \(([0-9]{2,}\.[0-9] MB|[0-9.]+ GB)\)|^Installing collected packages"
$(READY): SHELL := bash
$(READY): pyproject.toml constraints.txt
	@echo "Installing qat and its libraries into $(VENV): several GB are downloaded, which takes minutes."
	$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(BIN)/python -m pip install --progress-bar off --no-compile -c constraints.txt -e ".[dev,docs,export,sweep,loggers,transformers]" \
	  --config-settings editable_mode=compat | $(LARGE_PACKAGES)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt openvino # without what it tells its makers
	touch $@
	@echo "$(ACTIVATE)"

demo: $(READY) ## train a float ViT and its 2-bit twin on digits, compare them (2 minutes)
	$(BIN)/python train.py experiment=demo_fp run_dir=$(DEMO)/fp overwrite=true
	$(BIN)/python train.py experiment=demo_ofq_2bit ckpt=$(DEMO)/fp/checkpoints/best.ckpt run_dir=$(DEMO)/ofq_2bit overwrite=true
	$(BIN)/python eval.py ckpt=$(DEMO)/fp/checkpoints/best.ckpt run_dir=$(DEMO)/eval_fp
	$(BIN)/python eval.py ckpt=$(DEMO)/ofq_2bit/checkpoints/best.ckpt run_dir=$(DEMO)/eval_ofq_2bit
	$(BIN)/python export.py ckpt=$(DEMO)/ofq_2bit/checkpoints/best.ckpt format=packed run_dir=$(DEMO)/packed overwrite=true
	@$(BIN)/python -m qat.report $(DEMO)/eval_fp $(DEMO)/eval_ofq_2bit
	@echo "$(ACTIVATE)"

demo-seeds: $(READY) ## the demo over three seeds, with the float net given the same extra epochs as control (8 minutes)
	for seed in 0 1 2; do \
	  $(BIN)/python train.py experiment=demo_fp seed=$$seed run_dir=$(DEMO)/seed$$seed/fp overwrite=true || exit 1; \
	  start="seed=$$seed ckpt=$(DEMO)/seed$$seed/fp/checkpoints/best.ckpt overwrite=true"; \
	  $(BIN)/python train.py experiment=demo_ofq_2bit $$start run_dir=$(DEMO)/seed$$seed/ofq_2bit || exit 1; \
	  $(BIN)/python train.py experiment=demo_ofq_2bit quant=fp $$start run_dir=$(DEMO)/seed$$seed/fp_control || exit 1; \
	done
	@$(BIN)/python -m qat.report $(DEMO)/seed*/fp $(DEMO)/seed*/ofq_2bit $(DEMO)/seed*/fp_control

golden-deviations: $(READY) ## how far we are from the papers' own code
	@PYTHONPATH=. $(BIN)/python evidence/golden_deviations.py

SEED ?= 0
stress: $(READY) ## kill -9 commands at random moments, run them again, compare all they leave with runs that were not killed; SEED=1 (10 minutes)
	@PYTHONPATH=. $(BIN)/python evidence/stress.py --kills 40 --seed $(SEED)

models-page: $(READY) ## write docs/models.md: what conversion does to each timm family
	@$(BIN)/python -m evidence.pages.models_page

transformers-page: $(READY) ## write docs/transformers_models.md: what conversion does to each class of Transformers (2 minutes)
	$(BIN)/python -m evidence.pages.transformers_page

settings-page: $(READY) ## write docs/settings.md: every setting, its type, default and meaning
	@$(BIN)/python -m evidence.pages.settings_page

search-cost: $(READY) ## a look at the calibration images during a search, in float forwards, one thread; MODEL=deit_small_patch16_224 (5 minutes, 20)
	@PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python evidence/speed/search_cost.py --model $(or $(MODEL),deit_tiny_patch16_224)

WEIGHTS := outputs/weights
weights-figures: $(READY) ## the figures of weights, oscillation and cost in docs/analysis.md: a short 2-bit run, plain and annealed (4 minutes)
	$(BIN)/python train.py quant=fp trainer.max_epochs=3 run_dir=$(WEIGHTS)/fp overwrite=true
	for run in "plain callbacks=[default,oscillation]" "annealed callbacks=[default,cga,oscillation] callbacks.cga.epochs=6"; do \
	  $(BIN)/python train.py quant=ofq_2bit ckpt=$(WEIGHTS)/fp/checkpoints/best.ckpt trainer.max_epochs=20 trainer.log_every_n_steps=5 \
	    run_dir=$(WEIGHTS)/$${run%% *} overwrite=true $${run#* } || exit 1; \
	done
	$(BIN)/python analyze.py ckpt=$(WEIGHTS)/annealed/checkpoints/last.ckpt analysis=weights run_dir=$(WEIGHTS)/weights
	$(BIN)/python analyze.py ckpt=[$(WEIGHTS)/plain/checkpoints/last.ckpt,$(WEIGHTS)/annealed/checkpoints/last.ckpt] labels=[plain,annealed] \
	  analysis=oscillation run_dir=$(WEIGHTS)/oscillation
	$(BIN)/python analyze.py ckpt=$(WEIGHTS)/annealed/checkpoints/last.ckpt labels=[2bit] analysis=cost run_dir=$(WEIGHTS)/cost
	cp $(WEIGHTS)/weights/weights_histograms.svg docs/figures/weights-digits.svg
	cp $(WEIGHTS)/oscillation/oscillation.svg docs/figures/oscillation-digits.svg
	cp $(WEIGHTS)/cost/cost.svg docs/figures/cost-digits.svg
	$(BIN)/python -m evidence.pages.drawing $(addprefix docs/figures/,weights-digits.svg oscillation-digits.svg cost-digits.svg)

# Tables go to the screen and to evidence/logs.
LOGGED := set -o pipefail; export PYTHONPATH=. OMP_NUM_THREADS=1;
step-time step-count latency: SHELL := bash

step-time: $(READY) ## time and memory of a quantized training step in those of a float step: DeiT-T eager and compiled; DeiT-S, Swin-T eager (40 minutes)
	@$(LOGGED) { \
	  $(BIN)/python evidence/speed/step_time.py --compiled && echo && \
	  $(BIN)/python evidence/speed/step_time.py --batch 16 --rounds 5 && echo && \
	  $(BIN)/python evidence/speed/step_time.py --batch 4 --rounds 5 \
	    --models deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224 swin_tiny_patch4_window7_224; \
	} | tee evidence/logs/step-time.log

step-count: $(READY) ## bytes, kernels and host time of a training step on CUDA beside float's, counted without a GPU: DeiT-T, -S, -B (15 minutes)
	@$(LOGGED) $(BIN)/python evidence/speed/step_count.py | tee evidence/logs/step-count.log

PEER_PACKAGES := torchao==0.18.0 brevitas==0.13.4 dependencies==2.0.1 unfoldNd==0.2.3
$(PEERS)/.ready: $(READY)
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --no-deps $(PEER_PACKAGES)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $(PEERS)/lib/python3*/site-packages)/qat.pth
	touch $@

latency: $(READY) ## time of exported files beside float's in onnxruntime and OpenVINO, and in ExecuTorch where it is installed: DeiT-T, DeiT-S, Swin-T, one image and eight (20 minutes)
	@$(LOGGED) $(BIN)/python evidence/speed/latency.py | tee evidence/logs/latency.log && \
	  $(BIN)/python -m evidence.speed.latency_figure && $(BIN)/python -m evidence.pages.drawing docs/figures/latency.svg

test-gpu: $(READY) ## are kernels, nets and steps right on this machine's GPU; without one in Triton's interpreter and on the CPU (1 minute)
	@$(BIN)/python -m tests.gpu

gpu-bench: $(READY) ## on a CUDA device: training steps of DeiT-T/S/B in float steps, memory; again for what is left, evidence/gpu/README.md (9 minutes)
	@$(BIN)/python -m evidence.gpu

study: $(READY) $(if $(filter PEERS%,$(CLAIM)),$(PEERS)/.ready) ## runs of a claim that have no record yet, and the page: CLAIM=C1 CIFAR10=FOLDER
	$(BIN)/python -m evidence run $(CLAIM) --root "$(CIFAR10)"
	$(BIN)/python -m evidence page

zoo: $(READY) ## the trained nets in zoo/, of runs of `make study`: CIFAR10=FOLDER (a minute)
	$(BIN)/python -m evidence.zoo --root "$(CIFAR10)"

quickstart: $(READY) ## run examples/quickstart.ipynb and keep what it shows (3 minutes)
	$(BIN)/python -m tests.notebook

docs: $(READY) ## build site/ of the pages; a broken link is an error. To read it: .venv/bin/python -m http.server --directory site
	$(BIN)/python docs/theme/pages.py outputs/pages
	$(BIN)/zensical build --strict --clean

results: $(PEERS)/.ready ## all runs of the claims that have no record yet, and the page: CIFAR10=FOLDER (more than ten hours on 2 cores if evidence/records/ is empty)
	$(BIN)/python -m evidence run --root "$(CIFAR10)"
	$(BIN)/python -m evidence page

results-quick: $(READY) ## one small experiment in a temporary folder, and all pages anew from the committed records (1 minute)
	$(BIN)/python -m evidence quick

test: $(READY) ## the tests of every change, all but those of test-long (6 minutes on two cores)
	$(BIN)/python -m pytest -q $(PARALLEL)

test-fast: $(READY) ## tests that take seconds
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not long"

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-compile -c constraints-oldest.txt -e ".[dev,export,sweep,loggers,transformers]"
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --no-deps -c constraints-oldest.txt openvino
	touch $@

test-oldest: $(OLDEST)/.ready ## test-fast with the oldest versions that pyproject.toml allows, in an environment of its own (downloads several GB of wheels)
	$(OLDEST)/bin/python -m pytest -q $(PARALLEL) -m "not slow and not long"

APT := timeout 300 apt-get install -qq -y --no-install-recommends
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
system-packages: ## a browser for the tests of report.html, and SLURM for those of cluster jobs; as root
	timeout 120 apt-get update -qq
	-$(APT) chromium
	-$(APT) $(SLURM_PACKAGES)

test-slurm: $(READY) ## cluster jobs on the real SLURM, in a private directory; installs it where that is allowed (2 minutes)
	@for name in slurmctld slurmd srun munged; do PATH="$$PATH:/usr/sbin" command -v $$name >/dev/null || absent=yes; done; \
	if [ -n "$$absent" ]; then \
	  test "$$(id -u)" = 0 && { timeout 120 apt-get update -qq && $(APT) $(SLURM_PACKAGES); } >/dev/null 2>&1 \
	    || echo "not installed; as root: apt-get install --no-install-recommends $(SLURM_PACKAGES)"; \
	fi
	OMP_NUM_THREADS=1 timeout 600 $(BIN)/python -m pytest -q -rsPfE --log-level=INFO -m slurm tests/slurm

test-long: $(READY) ## what the tests of every change have no time for: compilers, processes, all families of nets, all mistakes
	$(BIN)/python -m pytest -q $(PARALLEL) -m long
	$(MAKE) test-cpus

test-cpus: $(READY) ## golden, kernel and export tests as on CPUs without AVX-512, with 1, 2 and 4 threads
	for isa in default avx2; do for threads in 1 2 4; do \
	  ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=$$isa QAT_TEST_THREADS=$$threads \
	    $(BIN)/python -m pytest -q $(PARALLEL) tests/functional tests/quantizers tests/kernels tests/ptq tests/export tests/system/test_zoo.py || exit 1; \
	done; done

check: lint types imports test ## everything that must be green: style, types, import directions, tests

WHEEL := $(CURDIR)/outputs/wheel
wheel: ## build outputs/wheel/*.whl, install it into an empty environment, train from an empty folder (downloads several GB of wheels)
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/empty
	git archive HEAD pyproject.toml README.md LICENSE conf qat | tar -x --one-top-level=$(WHEEL)/source
	$(PYTHON) -m venv $(WHEEL)/env
	$(WHEEL)/env/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) $(WHEEL)/source
	$(WHEEL)/env/bin/python -m pip install --quiet --no-compile -c constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL)/empty && ../env/bin/qat version && ../env/bin/qat train trainer.max_epochs=1 run_dir=run && ../env/bin/qat eval ckpt=run/checkpoints/best.ckpt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

clean: ## remove outputs and caches
	rm -rf outputs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
