# Everything starts here; `make help` lists it. Override on the command line: make PYTHON=python3.12 test JOBS=4
PYTHON ?= python3
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

TINY := config=configs/showo_tiny_demo.yaml
EMOJI := data/emoji_world_all
DEMO := outputs/demo
INPAINTING := red apple in fluent 3d style
EXTRAPOLATION := red apple in fluent 3d style *** red apple in fluent 3d style
QUESTIONS := What is this? *** Which style is it drawn in?

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-all lint format data-emoji train-tiny train-tiny-resume bench clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-18s %s\n", $$1, $$2 }'

setup: $(READY) ## make .venv and install (all other targets do it by themselves)

# Made once; made again when a requirements file changes.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed: make PYTHON=python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt -r requirements-dev.txt
	@touch $(READY)

demo: export WANDB_MODE := disabled
demo: $(READY) ## draw, inpaint, extrapolate and answer with the small default (checkpoints/showo-tiny)
	$(PY) inference_t2i.py $(TINY) mode=t2i output_dir=$(DEMO)/t2i validation_prompts_file=demo/prompts.txt
	$(PY) inference_t2i.py $(TINY) mode=inpainting output_dir=$(DEMO)/inpainting batch_size=4 \
		prompt='$(INPAINTING)' image_path=demo/inpainting.png inpainting_mask_path=demo/inpainting_mask.png
	$(PY) inference_t2i.py $(TINY) mode=extrapolation output_dir=$(DEMO)/extrapolation batch_size=4 \
		extra_direction='left *** right' prompt='$(EXTRAPOLATION)' image_path=demo/extrapolation.png
	$(PY) inference_mmu.py $(TINY) output_dir=$(DEMO)/mmu mmu_image_root=demo/pictures question='$(QUESTIONS)'
	@echo
	@echo "Look at the pictures:"
	@for mode in t2i inpainting extrapolation mmu; do echo "  $(CURDIR)/$(DEMO)/$$mode/grid.png"; done

PYTEST := PYTHONHASHSEED=0 $(PY) -m pytest -n $(JOBS) --dist loadfile

test: lint ## ruff and the CPU tests, under 15 minutes on 2 cores; what .ci/run calls
	$(PYTEST) -m 'not gpu and not multiprocess'

test-quick: lint ## the fast ones of them, under 2 minutes
	$(PYTEST) -m 'not slow and not gpu and not multiprocess'

test-all: lint ## every test, those with several processes and, where there is one, on the GPU too
	$(PYTEST)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## let ruff mend and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

data-emoji: $(READY) ## download and render the pictures the small default learns from
	$(PY) training/data/emoji_world.py output_dir=$(EMOJI) size=64 names=all

train-tiny: data-emoji ## train tokenizer and model of the small default from nothing (hours on a CPU)
	$(PY) training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml experiment.resume_from_checkpoint=null
	$(PY) training/train.py config=configs/showo_tiny.yaml experiment.resume_from_checkpoint=null

train-tiny-resume: $(READY) ## go on with that training from its last checkpoints
	$(PY) training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml
	$(PY) training/train.py config=configs/showo_tiny.yaml

bench: $(READY) ## both generation loops against the published algorithm
	$(PY) benchmarks/generation.py --hidden 512 --layers 8

clean: ## remove results and caches; .venv, data and checkpoints stay
	rm -rf outputs .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
