# make train   a GPT on Shakespeare, from nothing to a sample, on any machine
# make test    environment, lint, all but the long tests: under 10 minutes on 2 cores
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
CHAR = data/shakespeare_char
OUT = out-shakespeare-char

.PHONY: train test test-long test-old test-cuda bench clean

train: $(CHAR)/meta.json
	$(PY) train.py config/train_shakespeare_char.py
	$(PY) sample.py --out_dir=$(OUT) --max_new_tokens=500
	@echo "checkpoint: $(OUT)/ckpt.pt  curves: $(OUT)/log.jsonl, tensorboard --logdir=$(OUT)"

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m pytest -m "not long" --durations=10

test-long: $(VENV)/dev .venv-lm-eval/run
	$(PY) -m pytest -m long --durations=20

# In the Python that is there, if its torch finds a GPU: no network, no other package is needed.
test-cuda:
	@if $(PYTHON) -c 'import numpy, pytest, torch; assert torch.cuda.is_available()' 2>/dev/null; \
		then $(PYTHON) -m pytest tests/test_cuda.py; \
		else $(MAKE) $(VENV)/dev && $(PY) -m pytest tests/test_cuda.py; fi

# torch 1.13.1 is for job_torch1.yaml, 2.1.2 is in T9k's Notebook image; both need numpy 1.
OLD = 1.13.1 2.1.2
OLD_PYTHON ?= $(firstword $(foreach p,python3.10 python3.11,$(if $(shell $(p) -V 2>/dev/null),$(p))))
OLD_TESTS = $(addprefix tests/test_,model.py train.py sample.py checkpoint.py configurator.py \
	metrics.py hardware.py tokens.py plot.py prepare.py distributed.py rendezvous.py \
	owner.py)

test-old: $(addprefix test-torch-,$(OLD))

test-torch-%: .venv-torch-%/run
	.venv-torch-$*/bin/python -m pytest -m "not long" $(OLD_TESTS)

.PRECIOUS: .venv-torch-%/run
.venv-torch-%/run: Makefile
	@test -n "$(OLD_PYTHON)" || { echo 'make test-old: needs python3.10 or python3.11: install one, or type OLD_PYTHON=...'; exit 1; }
	$(OLD_PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install -q --disable-pip-version-check \
		torch==$* 'numpy<2' tqdm safetensors tiktoken datasets 'pyarrow<26' matplotlib pytest \
		hypothesis
	@touch $@

# lm-evaluation-harness, for one test, in addition to the packages in $(VENV).
.venv-lm-eval/run: $(VENV)/dev Makefile
	$(PY) -m venv .venv-lm-eval
	SITE='import site; print(site.getsitepackages()[0])'; \
		$(PY) -c "$$SITE" > "$$(.venv-lm-eval/bin/python -c "$$SITE")/dev.pth"
	timeout 900 .venv-lm-eval/bin/python -m pip install -q --disable-pip-version-check \
		lm-eval==0.4.13 $$($(PY) -m pip freeze | grep -E '^(torch|transformers|numpy)==')
	@touch $@

bench: $(VENV)/run
	$(PY) bench.py

# Your own text, put there as input.txt, is prepared again whenever it changes.
$(CHAR)/meta.json: $(CHAR)/prepare.py $(wildcard $(CHAR)/input.txt) | $(VENV)/run
	$(PY) $(CHAR)/prepare.py

$(VENV)/run: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/run tests/requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check -r tests/requirements.txt -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-lm-eval $(addprefix .venv-torch-,$(OLD))
