# After `git clone`: `make demo` or `make test`. Each makes .venv, installs what is missing and runs; no root needed.
# ARGS= goes to the command, PYTHON= names the interpreter that .venv is made with.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench

bin := .venv/bin

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..." is passed on; PYTHON=/path/to/python3 makes .venv with another interpreter and its torch'

demo: ## a small training run that explodes and is kept alive, with its page (ARGS="--steps 100")
	@.ci/bootstrap core
	$(bin)/gradmon demo $(ARGS)

test: ## all tests this machine can run (ARGS="-k agent")
	@.ci/bootstrap test
	$(bin)/python -m pytest $(ARGS)

test-all: ## what matters of them with the oldest torch and the newest of everything; takes long
	@.ci/bootstrap test
	$(bin)/python tests/versions.py $(ARGS)

lint: ## format, lint and types, and the Dockerfile
	@.ci/bootstrap lint
	$(bin)/python -m ruff format --check .
	$(bin)/python -m ruff check .
	$(bin)/python -m mypy
	$(bin)/hadolint Dockerfile
	$(bin)/shellcheck deploy/slurm/train-with-gradmon.sbatch

bench: ## what gradmon costs per training step
	@.ci/bootstrap core
	$(bin)/python tests/bench/overhead.py $(ARGS)
