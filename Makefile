# `make help` lists what there is. PYTHON=… picks the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# the stored outputs of the notebooks, and the tests, are those of the small model on a CPU
CHECK  := MINIGPT_MODEL=mini MINIGPT_DEVICE=cpu GRADIO_ANALYTICS_ENABLED=False

.DEFAULT_GOAL := help
.PHONY: help lab test quick gpu lessons chat export notebooks workbook progress mine lint types check data clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## */\1 /p' $(MAKEFILE_LIST) | while read -r name about; do printf '  make %-10s %s\n' "$$name" "$$about"; done

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python {v} is too old: 3.11 or newer is needed. Name one with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (ipykernel)" > /dev/null
	@touch $@

lab: $(READY)  ## set up if needed, then open JupyterLab in notebooks/
	cd notebooks && ../$(BIN)/jupyter lab

test: $(READY)  ## set up if needed, then run every test, the notebooks included
	$(CHECK) $(BIN)/python -m pytest tests --nbval --nbval-current-env notebooks

quick: $(READY)  ## the tests without notebooks, browsers, other processes and large models
	$(CHECK) $(BIN)/python -m pytest tests -q -m "not slow"

lessons: $(READY)  ## the ten lessons alone, from clean kernels, compared with their stored outputs
	$(CHECK) $(BIN)/python -m pytest --nbval --nbval-current-env notebooks/0[0-9]_*.ipynb

gpu:  ## check and measure decoding on a CUDA GPU, with the PyTorch of $(PYTHON): no set-up, no network
	PYTHONPATH=. $(PYTHON) -m pytest -q -m cuda -p no:cacheprovider tests || true
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py

chat: $(READY)  ## open the chat app on http://127.0.0.1:7860
	$(BIN)/minigpt chat

workbook: $(READY)  ## write workbook/: the lessons with exercises to fill in; work there is kept
	$(BIN)/python tools/workbook.py write

progress: $(READY)  ## what is done in workbook/
	$(BIN)/python tools/workbook.py progress

mine: $(READY)  ## a library of your own answers, and the chat on it
	$(BIN)/python tools/workbook.py mine
	PYTHONPATH=workbook/mine $(BIN)/python -m minigpt_lib.cli chat

export: $(READY)  ## write minigpt_lib/ from the notebooks
	$(BIN)/python tools/export.py

notebooks: $(READY)  ## run every notebook from a clean kernel, in order, and store the outputs
	$(BIN)/python tests/run_notebooks.py

lint: $(READY)  ## ruff over the library, the tests, the scripts and the notebooks
	$(BIN)/ruff check .

types: $(READY)  ## mypy over minigpt_lib/
	$(BIN)/mypy

check: lint types export  ## lint, types, and the proof that minigpt_lib/ is what the notebooks export
	git diff --exit-code --stat -- minigpt_lib
	@test -z "$$(git ls-files --others --exclude-standard -- minigpt_lib)" || { echo "minigpt_lib/ has files that no commit holds"; exit 1; }

data: $(READY)  ## write the corpus, the instruction records and facts.json anew
	$(BIN)/python data/compose.py

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -o -name .ipynb_checkpoints | grep -v '^./.git/' | xargs rm -rf
