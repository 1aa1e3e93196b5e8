# make train   a GPT on Shakespeare, from nothing to a sample, on any machine
# make test    environment, lint, all tests: under 10 minutes on 2 cores
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
CHAR = data/shakespeare_char
OUT = out-shakespeare-char

.PHONY: train test test-long test-torch1 bench clean

train: $(VENV)/run $(CHAR)/meta.json
	$(PY) train.py config/train_shakespeare_char.py
	$(PY) sample.py --out_dir=$(OUT) --max_new_tokens=500
	@echo "checkpoint: $(OUT)/ckpt.pt  curves: $(OUT)/log.jsonl, tensorboard --logdir=$(OUT)"

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m pytest -m "not long" --durations=10

test-long: $(VENV)/dev
	$(PY) -m pytest -m long --durations=20

# The oldest torch that the cluster's images have; it wants Python 3.10 or 3.11 and numpy 1.
test-torch1: .venv-torch1/run
	.venv-torch1/bin/python -m pytest -m "not long" tests/test_train.py tests/test_sample.py

bench: $(VENV)/run
	$(PY) bench.py

$(CHAR)/meta.json: $(VENV)/run $(CHAR)/prepare.py data/tokens.py
	$(PY) $(CHAR)/prepare.py

$(VENV)/run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-torch1
