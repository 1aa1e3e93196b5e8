# make train   trains a GPT on Shakespeare from scratch and samples from it, on any machine
# make test    environment, lint, all tests except the long ones: under 10 minutes on 2 cores
VENV ?= .venv
PY = $(VENV)/bin/python
CHAR = data/shakespeare_char
OUT = out-shakespeare-char

.PHONY: train test test-long test-environments test-cuda bench clean

train: $(CHAR)/meta.json
	$(PY) train.py config/train_shakespeare_char.py
	$(PY) sample.py --out_dir=$(OUT) --max_new_tokens=500
	@echo "checkpoint: $(OUT)/ckpt.pt  curves: $(OUT)/log.jsonl, $(VENV)/bin/tensorboard --logdir=$(OUT)"

test: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m pytest -m "not long" --durations=10

test-long: $(VENV)/dev .venv-lm-eval/run
	$(PY) -m pytest -m long --durations=20

# In the installed Python, if its torch finds a GPU: needs no network and no other packages.
test-cuda:
	@if $(or $(PYTHON),python3) -c 'import numpy, pytest, torch; assert torch.cuda.is_available()' 2>/dev/null; \
		then $(or $(PYTHON),python3) -m pytest tests/test_cuda.py; \
		else $(MAKE) $(VENV)/dev && $(PY) -m pytest tests/test_cuda.py; fi

# CI's other environments: the Python, and what pip installs in addition to requirements.txt. They
# are created, tested and removed one after another, since each takes up to 6 GB.
lowest = python3.10 -c tests/lowest.txt
notebook = python3.10 torch==2.1.2 numpy==1.26.4 transformers==4.46.3  # T9k's Notebook image
oldest-3.12 = python3.12 torch==2.4.1 transformers==4.46.3
newest = python3.13 torch==2.14.1
ENVIRONMENTS = lowest notebook oldest-3.12 newest
SCRIPT_TESTS = $(addprefix tests/test_,train.py sample.py prepare.py export.py model.py \
	checkpoint.py tokens.py configurator.py metrics.py hardware.py plot.py distributed.py \
	rendezvous.py owner.py tokenizer_json.py)

test-environments: $(addprefix test-in-,$(ENVIRONMENTS))

test-in-%:
	sh support/venv.sh .venv-$* $(firstword $($*)) $(wordlist 2,9,$($*)) -r requirements.txt \
		pytest hypothesis matplotlib transformers
	.venv-$*/bin/python -m pytest -m "not long" $(SCRIPT_TESTS)
	rm -rf .venv-$*

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

# Your own text, input.txt, is prepared each time, since its date can be older than meta.json's.
ifneq ($(wildcard $(CHAR)/input.txt),)
.PHONY: $(CHAR)/meta.json
endif
$(CHAR)/meta.json: | $(VENV)/run
	$(PY) $(CHAR)/prepare.py

# Removing its mark recreates an environment that is broken, was moved, or is of another Python.
$(shell sh support/venv.sh $(VENV) '$(PYTHON)' || rm -f $(VENV)/run)
$(VENV)/run: requirements.txt constraints.txt
	sh support/venv.sh $(VENV) '$(PYTHON)' -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/run tests/requirements.txt
	sh support/venv.sh $(VENV) '' -r tests/requirements.txt -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-lm-eval $(addprefix .venv-,$(ENVIRONMENTS))
