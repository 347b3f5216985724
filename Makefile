# palmtop: make demo · make test · make check · make bench. Each makes .venv when it is missing.
PYTHON ?= python3
RUN    := .venv/bin/python
DEMO_RUN ?= runs/demo
# Other values of the demo's recipe, such as: make demo DEMO="pretrain.tokens=100k sft.epochs=3"
DEMO     ?=

.PHONY: demo test check bench clean

# torch first: deepspeed builds against it, and a pinned torch keeps pip from fetching another one.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "palmtop needs Python 3.11 or 3.12; name one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 $(RUN) -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[deepspeed]'
	@touch $@

demo: .venv/ready
	$(RUN) -m pipeline recipes/demo.yaml folder=$(DEMO_RUN) $(DEMO)
	@echo "talk to it: $(RUN) -m sft chat $(DEMO_RUN)/sft/model"

# Files are shared out to two processes, whole, for some have fixtures that are costly to make; a thread each,
# because threads of several processes that wait for each other by spinning are many times slower. In the order of
# tests/conftest.py, the slow ones first.
test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 40

check: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy .
	$(RUN) -m mypy train.py
	.venv/bin/lint-imports

bench: .venv/ready
	$(RUN) bench/train_step.py
	$(RUN) bench/data.py
	$(RUN) bench/checkpoint.py

clean:
	rm -rf .venv build *.egg-info
