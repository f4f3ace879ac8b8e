VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow contract compat nano release lint bench clean

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[fast]"
	touch $@

$(VENV)/.test: $(VENV)/.ready
	$(PY) -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.ready  ## environment, captions of examples/, then facts taught and recalled
	$(PY) -m microvlm caption examples
	$(PY) -m microvlm demo

test: $(VENV)/.test lint  ## everything but the slow checks
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test  ## torch.compile and other checks that take minutes
	$(PY) -m pytest -m slow

contract: $(VENV)/.test  ## transformers' own test mixins on this model; TRANSFORMERS=FOLDER: a checkout, which has all of them
	@set -e; folder="$(TRANSFORMERS)"; if [ -z "$$folder" ]; then \
	    name=$$($(PY) -c "from importlib.metadata import version; print('transformers==' + version('transformers'))"); \
	    folder=dist/$$(echo "$$name" | sed s/==/-/); \
	    [ -e "$$folder.tar.gz" ] || $(PY) -m pip download --quiet --no-deps --no-binary :all: --dest dist "$$name"; \
	    tar -xzf "$$folder.tar.gz" -C dist; touch "$$folder/tests/__init__.py"; \
	fi; OMP_NUM_THREADS=1 TRANSFORMERS_TESTS="$$folder/tests" \
	    $(PY) -m pytest -o addopts=-q -o filterwarnings=default -rfEs tests/test_contract.py $(SELECT)

compat: $(VENV)/.test  ## the fast tests with the lowest and the newest supported transformers, where they differ from the installed
	$(PY) tools/compat.py

nano: $(VENV)/.ready  ## the shipped model from nothing, in hours, in place of the one here: recipes/nano/README.md; goes on where it was stopped
	$(PY) -m pip install --quiet --editable ".[train,pictures,eval]"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash recipes/nano/run.sh

release: $(VENV)/.ready  ## what a Hub repo receives, checked and loaded, in dist/microvlm; RELEASE="--tag v1.0.1 ...": more options
	$(PY) tools/release.py dist/microvlm $(RELEASE)

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/.test  ## the measurements that need no more than this folder; benchmarks/ has more, each with its command in the docs
	$(PY) -m benchmarks.parameters
	$(PY) -m benchmarks.train_throughput
	$(PY) -m benchmarks.memory_recall

clean:  ## all that can be made again; runs/ stays
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
