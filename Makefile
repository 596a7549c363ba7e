# make demo      train the embedded example and check what it learned
# make test      run the tests, offline
# make quality   ruff check and format check
# make style     let ruff mend what it can
# make deit      write the DeiT model files anew from the ViT ones

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := test
.PHONY: demo test quality style deit

# torch goes first and alone: solved together with the rest, a looser request could fetch a second, far larger build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,quality,demo]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/demo.py

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

deit: $(INSTALLED)
	for part in configuration maps modeling; do \
	    sed -e 's/ViT/DeiT/g' -e 's/vit/deit/g' hf_simprune/models/vit/$${part}_simprune_vit.py \
	        > hf_simprune/models/deit/$${part}_simprune_deit.py; \
	done
	$(BIN)/ruff check --quiet --fix hf_simprune/models/deit
	$(BIN)/ruff format --quiet hf_simprune/models/deit
