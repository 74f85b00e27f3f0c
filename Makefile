# make demo   evaluation, parity and benchmark on bundled weights and real images (GUARDIANS_DATA, or the 20 offline samples)
# make test   the test suite
# make lint   ruff and mypy
# make docs   the documentation, docs/_build/html
# make gpu    on a CUDA device: tests marked gpu, parity, throughput and evaluation, into results/gpu
# make results   every table and figure in results/, as far as it is not there yet: days on a small machine, resumable
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint docs gpu results clean

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

docs: $(VENV)/docs/.installed
	$(VENV)/docs/bin/sphinx-build -W --keep-going -q docs docs/_build/html

gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu -n 8
	$(BIN)/guardians parity --n 100 --device cuda --attack FGSM --attack PGD-40 --out results/gpu
	$(BIN)/guardians study benchmarks/attack_throughput.yaml --device cuda --out results/gpu
	$(BIN)/guardians study benchmarks/evaluation.yaml --n 100 --device cuda --out results/gpu

results: $(VENV)/.installed
	for study in $(STUDIES); do $(BIN)/guardians study $$study --out results || exit; done
	$(BIN)/guardians study benchmarks/robust_neural_networks.yaml --out results/robust_neural_networks
	$(BIN)/guardians study benchmarks/curves.yaml --out results/curves
	$(BIN)/guardians parity --n 200 $(EXACT:%=--attack %) $(DEFENCES:%=--attack %) --out results
	$(BIN)/guardians parity --n 20 $(SINGLE:%=--attack %) --out results
	$(BIN)/guardians parity --own-rules --n 200 --attack FGSM --attack PGD-40 --out results
	$(BIN)/guardians check --all --out results
	$(BIN)/guardians audit --planted --n 100 --data-seed 1 --out results
	$(BIN)/python benchmarks/attack_memory.py
	$(BIN)/python benchmarks/defence_speed.py --rounds 5
	$(BIN)/python benchmarks/process_scaling.py
	$(BIN)/guardians report --out results

STUDIES  := $(filter-out %/robust_neural_networks.yaml %/curves.yaml,$(wildcard benchmarks/*.yaml))
EXACT    := FGSM PGD-10 PGD-40 Square-100
DEFENCES := RSE MI-PL MI-OL MI-Combined RandomSelfEnsembleClassifier MixupInferenceClassifier EOT-PGD \
            AveragedMixturePGD AdversarialTrainer
SINGLE   := "C&W" DDN-20 FMN-20 APGD-20 APGD-100 FAB-100

# Installed again only when the dependencies change.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $@

# Beside the others, which it sees: Sphinx needs a newer requests than torchattacks bears.
$(VENV)/docs/.installed: $(VENV)/.installed
	$(BIN)/python -m venv $(VENV)/docs
	$(BIN)/python -c "import site; print(*site.getsitepackages())" > $$(echo $(VENV)/docs/lib/python*/site-packages)/base.pth
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
