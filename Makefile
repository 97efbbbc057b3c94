# make demo and make test do all the set-up on a fresh machine, once; run again they start at once.
# A certain interpreter: make demo PYTHON=/path/to/python3.11     Some of the tests: make test ARGS="-k store"
# Tests run in two processes, of about 2.5 GB each; make test WORKERS=0 runs them in one.

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow newest demo demo-photos demo-controlnet lint docs clean

# For a MindSpore other than that of constraints.txt, with the newest mindone:
# make newest MINDSPORE=2.9.0    (without a version: the newest that there is)
NEWEST := .venv-newest
NEWEST_TESTS := $(addprefix tests/test_,audit.py cpu_substitutes.py cpu_models.py fp32.py doctor.py dropout.py)
FOLLOW_MINDONE := mindspore|mindone|transformers|tokenizers|huggingface_hub

# Written last, holds the place it was written at: there is no stamp, or another place in it, unless all is installed.
STAMP := .venv/.installed
ifneq ($(shell [ -x .venv/bin/python ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && echo here),here)
  ANEW := yes
  .PHONY: $(STAMP)
endif

# The first candidate that runs and is a 3.11 (a name on PATH may be a stand-in that does not run).
CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python)
PYTHON311 = $(shell for p in $(CANDIDATES); do \
    "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && command -v "$$p" && break; done)
HAS_VENV = $(shell "$(PYTHON311)" -c 'import ensurepip, venv; print("yes")' 2>/dev/null)
LOOKED_FOR = $(if $(PYTHON),PYTHON=$(PYTHON) does not run or is another version,looked for python3.11$(comma) \
    python3 and python on PATH)
comma := ,
NO_PYTHON = Python 3.11 is needed: $(LOOKED_FOR); install Python 3.11, or name one: make $(MAKECMDGOALS) \
    PYTHON=/path/to/python3.11
NO_VENV = $(PYTHON311) cannot make virtual environments (no venv or ensurepip); on Debian and Ubuntu: apt install \
    python3.11-venv

# Nothing from the caller's Python settings may reach the environment; CANN, for one, sets PYTHONPATH, hence -I below.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_USER := 0
PIP := .venv/bin/python -I -m pip

WORKERS := 2
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@echo "make demo   on a fresh machine installs everything into .venv, teaches a small FLUX.1 a new word and shows it"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## install into .venv (Python 3.11; once: 2 to 5 minutes, 3.4 GB)
	@echo "Everything is installed in .venv."

test: $(STAMP) ## run the tests, the slow ones left out (ARGS="..." goes to pytest)
	@$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## run the slow tests
	@$(PYTEST) -m slow $(ARGS)
	@HYPOTHESIS_DEPTH=100 $(PYTEST) tests/test_hostile_files.py

newest: ## what depends on MindSpore's version, with the newest (or MINDSPORE=2.9.0), in .venv-newest
	$(if $(PYTHON311),,$(error $(NO_PYTHON)))$(if $(HAS_VENV),,$(error $(NO_VENV)))
	@"$(PYTHON311)" -m venv --clear $(NEWEST)
	@grep -vE '^($(FOLLOW_MINDONE))==' constraints.txt > $(NEWEST)/requirements.txt
	@$(NEWEST)/bin/python -I -m pip install -qq -r $(NEWEST)/requirements.txt 'mindspore$(addprefix ==,$(MINDSPORE))' mindone
	@$(NEWEST)/bin/python -I -m pip install -qq --no-deps -e .
	@$(NEWEST)/bin/python -I -m pip list 2>/dev/null | grep -E '^($(FOLLOW_MINDONE)) '
	@failed=0; \
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or not slow" $(NEWEST_TESTS) $(ARGS) || failed=1; \
	$(NEWEST)/bin/python tests/audit.py || failed=1; exit $$failed

demo: $(STAMP) ## teach a small FLUX.1 a new word with a LoRA, on CPU, and look at what it draws
	@PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python examples/demo.py

demo-photos: $(STAMP) ## train a LoRA on five real photos, with a tiny FLUX.1 of random weights
	@PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python examples/demo_photos.py

demo-controlnet: $(STAMP) ## teach the small FLUX.1 to follow outlines with a ControlNet
	@PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python examples/demo_controlnet.py

lint: $(STAMP) ## check the style, the types, and that imports point down only
	@.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/lint-imports

docs: $(STAMP) ## build the site of docs/ to site/; links that lead nowhere are errors
	@.venv/bin/python -c 'import material' 2>/dev/null || $(PIP) install -qq -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

clean: ## remove .venv, .venv-newest and what Python, pytest and ruff left (demo, stores and runs stay)
	@rm -rf .venv $(NEWEST) build site *.egg-info .pytest_cache .ruff_cache
	@find $(wildcard pipeline tasks cache tests examples benchmarks) -name __pycache__ -prune -exec rm -rf {} +

# An environment whose installation was cut short may look whole to pip, so only a finished one is updated in place.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(if $(PYTHON311),,$(error $(NO_PYTHON)))$(if $(HAS_VENV),,$(error $(NO_VENV)))
	@echo "Installing into .venv with $(PYTHON311), once: 2 to 5 minutes, 3.4 GB, most of it MindSpore ..."
	@rm -f $(STAMP)
	$(if $(ANEW),@"$(PYTHON311)" -m venv --clear .venv)
	@$(PIP) install -qq -c constraints.txt -e '.[test,demo,dev]'
	@pwd -P > $(STAMP)
