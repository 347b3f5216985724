# palmtop: make demo · make test · make check · make bench. Each makes .venv when it is missing.
PYTHON ?= python3
RUN    := .venv/bin/python
# What the demo trains; smaller budgets make a smaller demo.
DEMO_TOKENS ?= 400k
DEMO_EPOCHS ?= 10
DEMO_RUN    ?= runs/demo

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
	$(RUN) train.py --size tiny --data sample --tokens $(DEMO_TOKENS) --batch-tokens 2048 --run $(DEMO_RUN) \
		--optimizer.lr 2e-3 --eval.every 80k --eval.tokens 20k
	@$(RUN) -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
		folder = sys.argv[1]; model = M.from_pretrained(folder); tokenizer = T.from_pretrained(folder); \
		print(f"transformers loads it: {type(model).__name__} with {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")' \
		$(DEMO_RUN)/model
	$(RUN) -m sft $(DEMO_RUN)/model --data sample --epochs $(DEMO_EPOCHS) --batch-tokens 1024 --run $(DEMO_RUN)-sft \
		--optimizer.lr 2e-3 --eval.every 1G --eval.prompts '["What is the capital of Portugal?"]' --eval.answer 32
	@$(RUN) -c 'import json, sys; \
		first, *_, last = map(json.loads, open(sys.argv[1], encoding="utf-8")); \
		print("asked: ", first["prompt"], "\nbefore:", first["text"], "\nafter: ", last["text"])' \
		$(DEMO_RUN)-sft/samples.jsonl
	$(RUN) -m scoring $(DEMO_RUN)-sft/model --suite sample --max-out-len 64
	$(RUN) -m export $(DEMO_RUN)-sft/model
	$(RUN) -m export bench $(DEMO_RUN)-sft/export --prompts '[64]' --new-tokens 64 --threads '[2]' --torch false
	@echo "talk to it: $(RUN) -m sft chat $(DEMO_RUN)-sft/model"

# Files are shared out to two processes, whole, for some have fixtures that are costly to make; a thread each,
# because threads of several processes that wait for each other by spinning are many times slower. In the order of
# tests/conftest.py, the slow ones first.
test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

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
