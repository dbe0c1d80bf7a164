# Everything is done by `smae ...` and `python -m tools ...`; make only makes the environment first.
#   make demo                 all three tasks        make demo TASK=btcv     one
#   make test                 all tests              make lab                JupyterLab on the notebooks
#   make test-fast            those that take seconds: no notebooks, no long chains of trainings
#   make env-browser          a Chromium, without which one test is skipped (as root it may install system packages)
#   make env-slurm            SLURM, without which one test is skipped (Debian, as root)
#   make real                 the notebooks on real scans (MSD hippocampus, 27 MB, downloaded into data/real or DATA=...)
PYTHON ?= python3
RUN = .venv/bin/python -m smae_utils
TOOLS = .venv/bin/python -m tools

.PHONY: env env-browser env-slurm demo real test test-fast lab
env:
	@$(PYTHON) -m tools env
env-browser: env
	@$(TOOLS) env --browser
env-slurm: env
	@$(TOOLS) env --slurm
demo: env
	@$(TOOLS) demo $(if $(TASK),--task $(TASK))
real: env
	@$(RUN) download hippocampus --out $(or $(DATA),data/real)
	@$(TOOLS) demo --task hippocampus --data $(or $(DATA),data/real) --out build/real
test: env
	@$(TOOLS) test $(TESTS)
test-fast: env
	@$(TOOLS) test -m "not slow" $(TESTS)
lab: env
	@$(RUN) lab
