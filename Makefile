# make demo | test | bench [AREA=encode] | soak | clean. Each sets up .venv by itself; make clean keeps it.
PYTHON ?= python3.11
BIN := .venv/bin

# Models come from installed packages: nothing is looked up on a hub, and tokenizers fork without a warning.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench soak clean

demo: .venv/.installed-run
	$(BIN)/python -m jobs.recipes.stamps
	$(BIN)/braid run jobs/recipes/stamps.yaml --metrics build/runs/$$(date +%s).json
	$(BIN)/python -m jobs.demo jobs/recipes/stamps.yaml --metrics build/runs/*.json --out build/demo.json

test: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks $(AREA)

soak: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# [dev] holds all of [run], so that making it makes both.
.venv/.installed-run .venv/.installed-dev: .venv/.installed-%: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	    echo "error: $(PYTHON) is missing, is not Python 3.11, or cannot make environments." >&2; \
	    echo "On Debian 12: apt-get install python3.11 python3.11-venv; elsewhere: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }; \
	  rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "installing .[$*] into .venv, for a minute or more"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@ .venv/.installed-run
