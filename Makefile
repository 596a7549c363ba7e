# make demo         train the embedded example and check what it learned
# make test         run the tests, offline
# make test-ranks   train on two and four processes, whole and sharded, and compare with one
# make test-docs    run every code block of README and docs
# make test-faults  kill, starve and mislead runs in every way we know, and count the trials
# make test-browser  open the page of `hf-simprune explore` in a headless browser (npm fetches it)
# make quality      ruff check, format check and types
# make types        mypy, over the whole package
# make style        let ruff mend what it can
# make families     write anew what the DeiT and DINOv2 model files share with the ViT ones

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCHAO := $(VENV)/torchao
# Byte code is written for what is imported, when it is: most of it never is.
QUIETLY := --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := test
.PHONY: demo test test-ranks test-docs test-faults test-browser quality types style families

# torch goes first and alone: solved together with the rest, a looser request could fetch a second, far larger build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIETLY) torch
	$(BIN)/python -m pip install $(QUIETLY) --editable ".[test,quality,demo]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/demo.py

# Three at a time on two cores: many tests wait for something.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not faults and not ranks and not documents"

# Apart from the environment, because transformers imports torchao wherever it is, and it prints a page about its kernels.
$(TORCHAO): $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install $(QUIETLY) --no-deps --target $@ torchao
	touch $@

test-docs: $(INSTALLED) $(TORCHAO)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/$(TORCHAO)" $(BIN)/python -m pytest -n 2 -m documents tests/docs tests/works_with

test-ranks: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ranks tests/dino

test-faults: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

test-browser: $(INSTALLED)
	$(BIN)/python -m pip install $(QUIETLY) --editable ".[browser]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	    HF_SIMPRUNE_CHROMIUM=$${HF_SIMPRUNE_CHROMIUM:-$$($(BIN)/python tests/explore/fetch_chromium.py $(VENV)/chromium)} \
	    $(BIN)/python -m pytest tests/explore/test_page.py

quality: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

families: $(INSTALLED)
	for part in blocks configuration maps modeling reduction; do \
	    sed -e 's/ViT/DeiT/g' -e 's/vit/deit/g' hf_simprune/models/vit/$${part}_simprune_vit.py \
	        > hf_simprune/models/deit/$${part}_simprune_deit.py; \
	done
	for part in blocks maps reduction; do \
	    sed -e 's/ViT/Dinov2/g' -e 's/vit/dinov2/g' \
	        -e 's/layernorm_before/norm1/g' -e 's/layernorm_after/norm2/g' \
	        -e 's/layer\.dropout(layer\.mlp/layer.layer_scale2(layer.mlp/' -e 's/layer\.dropout/layer.layer_scale1/' \
	        hf_simprune/models/vit/$${part}_simprune_vit.py > hf_simprune/models/dinov2/$${part}_simprune_dinov2.py; \
	done
	$(BIN)/ruff check --quiet --fix hf_simprune/models/deit hf_simprune/models/dinov2
	$(BIN)/ruff format --quiet hf_simprune/models/deit hf_simprune/models/dinov2
