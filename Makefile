# Everything is done by `python -m smae_utils ...`; make only makes the environment first.
#   make demo                 all three tasks        make demo TASK=btcv     one
#   make test                 all tests              make lab                JupyterLab on the notebooks
#   make real                 the notebooks on real scans (MSD hippocampus, 27 MB, downloaded into data/real or DATA=...)
PYTHON ?= python3
RUN = .venv/bin/python -m smae_utils

.PHONY: env demo real test lab
env:
	@$(PYTHON) -m smae_utils env
demo: env
	@$(RUN) demo $(if $(TASK),--task $(TASK))
real: env
	@$(RUN) download hippocampus --out $(or $(DATA),data/real)
	@$(RUN) demo --task hippocampus --data $(or $(DATA),data/real) --out build/real
test: env
	@$(RUN) test $(TESTS)
lab: env
	@$(RUN) lab
