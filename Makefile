# Everything is done by `python -m smae_utils ...`; make only makes the environment first.
#   make demo                 all three tasks        make demo TASK=btcv     one
#   make test                 all tests              make lab                JupyterLab on the notebooks
#   make test-fast            those that take seconds: no notebooks, no long chains of trainings
#   make env-browser          a Chromium, without which one test is skipped (as root it may install system packages)
#   make real                 the notebooks on real scans (MSD hippocampus, 27 MB, downloaded into data/real or DATA=...)
PYTHON ?= python3
RUN = .venv/bin/python -m smae_utils

.PHONY: env env-browser demo real test test-fast lab
env:
	@$(PYTHON) -m smae_utils env
env-browser: env
	@$(RUN) env --browser
demo: env
	@$(RUN) demo $(if $(TASK),--task $(TASK))
real: env
	@$(RUN) download hippocampus --out $(or $(DATA),data/real)
	@$(RUN) demo --task hippocampus --data $(or $(DATA),data/real) --out build/real
test: env
	@$(RUN) test $(TESTS)
test-fast: env
	@$(RUN) test -m "not slow" $(TESTS)
lab: env
	@$(RUN) lab
