# Everything is done by `python -m smae_utils ...`; make only makes the environment first.
#   make demo                 all three tasks        make demo TASK=btcv     one
#   make test                 all tests              make lab                JupyterLab on the notebooks
PYTHON ?= python3
RUN = .venv/bin/python -m smae_utils

.PHONY: env demo test lab
env:
	@$(PYTHON) -m smae_utils env
demo: env
	@$(RUN) demo $(if $(TASK),--task $(TASK))
test: env
	@$(RUN) test $(TESTS)
lab: env
	@$(RUN) lab
