# make demo   evaluation, parity and benchmark on bundled weights and real images (GUARDIANS_DATA, or the 20 offline samples)
# make test   the test suite
# make lint   ruff and mypy
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/guardians evaluate --n 100 --out runs/demo
	$(BIN)/guardians parity --n 20 --attack FGSM --attack PGD-10 --out runs/demo
	$(BIN)/guardians bench --n 100 --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed again only when the dependencies change.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
