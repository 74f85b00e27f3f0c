# make demo   evaluation, parity and benchmark on bundled weights and real images (GUARDIANS_DATA, or the 20 offline samples)
# make test   the test suite
# make lint   ruff and mypy
# make results   every table and figure in results/, as far as it is not there yet: days on a small machine, resumable
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint results clean

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

results: $(VENV)/.installed
	for study in benchmarks/*.yaml; do $(BIN)/guardians study $$study --out results || exit; done
	$(BIN)/guardians parity --n 200 $(EXACT:%=--attack %) $(DEFENCES:%=--attack %) --out results
	$(BIN)/guardians parity --n 20 $(SINGLE:%=--attack %) --out results
	$(BIN)/guardians parity --own-rules --n 200 --attack FGSM --attack PGD-40 --out results
	$(BIN)/guardians check --all --out results
	$(BIN)/guardians audit --planted --n 100 --data-seed 1 --out results
	$(BIN)/python benchmarks/attack_memory.py
	$(BIN)/python benchmarks/defence_speed.py --rounds 5

EXACT    := FGSM PGD-10 PGD-40 Square-100
DEFENCES := RSE MI-PL MI-OL MI-Combined RandomSelfEnsembleClassifier MixupInferenceClassifier EOT-PGD \
            AveragedMixturePGD AdversarialTrainer
SINGLE   := "C&W" DDN-20 FMN-20 APGD-20 APGD-100 FAB-100

# Installed again only when the dependencies change.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
