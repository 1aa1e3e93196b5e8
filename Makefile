# make train   a GPT on Shakespeare, from nothing to a sample, on any machine
# make test    environment, lint, all tests: under 10 minutes on 2 cores
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
CHAR = data/shakespeare_char
OUT = out-shakespeare-char

.PHONY: train test test-long test-torch1 bench clean

train: $(CHAR)/meta.json
	$(PY) train.py config/train_shakespeare_char.py
	$(PY) sample.py --out_dir=$(OUT) --max_new_tokens=500
	@echo "checkpoint: $(OUT)/ckpt.pt  curves: $(OUT)/log.jsonl, tensorboard --logdir=$(OUT)"

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m pytest -m "not long" --durations=10

test-long: $(VENV)/dev
	$(PY) -m pytest -m long --durations=20

# The oldest torch that job_torch1.yaml's image has; it wants Python 3.10 or 3.11, and numpy 1.
OLD = .venv-torch1
OLD_PYTHON ?= $(firstword $(foreach p,python3.10 python3.11,$(if $(shell $(p) -V 2>/dev/null),$(p))))
OLD_TESTS = $(addprefix tests/test_,model.py train.py sample.py checkpoint.py configurator.py metrics.py hardware.py)

test-torch1: $(OLD)/run
	$(OLD)/bin/python -m pytest -m "not long" $(OLD_TESTS)

$(OLD)/run: Makefile
	@test -n "$(OLD_PYTHON)" || { echo 'make test-torch1: needs python3.10 or python3.11: install one, or type OLD_PYTHON=...'; exit 1; }
	$(OLD_PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install -q --disable-pip-version-check \
		torch==1.13.1 'numpy<2' tqdm safetensors tiktoken pytest hypothesis
	@touch $@

bench: $(VENV)/run
	$(PY) bench.py

# A text of one's own, put there as input.txt, is prepared anew when it changes.
$(CHAR)/meta.json: $(CHAR)/prepare.py $(wildcard $(CHAR)/input.txt) | $(VENV)/run
	$(PY) $(CHAR)/prepare.py

$(VENV)/run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLD)
