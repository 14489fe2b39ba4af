# make demo   trains a LoRA on real photographs with the bundled model, and restores one of them
# make test   the tests
# make bench  time and memory of everything against diffusers, peft and transformers
# make speedrun  how long a LoRA takes from the base to a goal (docs/speedrun.md)
# Each creates the virtual environment if it is missing. You need Python 3.11 or newer.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

demo: $(VENV)/run
	$(BIN)/python train.py --hr-root tests/photos --output-dir runs/demo --overwrite \
		--degrade underexpose=2/2000/4 --prompt "Brighten this dark photo and remove its noise." \
		--steps 200 --lora-targets all --sigma source --penalty psnr --ema 0.95 --validate-every-epochs 50
	$(BIN)/python sample.py --input tests/photos/picosdeeuropa.jpg --output runs/demo/demo.png --lora runs/demo/lora.safetensors \
		--degrade underexpose=2/2000/4 --compare --steps 1 --overwrite
	@echo "look at runs/demo/demo.png: degraded | restored | clean"

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(ARGS)

# constraints.txt holds the exact versions that the tests ran with.
$(VENV)/run: pyproject.toml constraints.txt
	@echo "installing torch and five small packages into $(VENV); with CUDA these are several gigabytes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/test: $(VENV)/run
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

bench: $(VENV)/test
	$(BIN)/python tests/bench.py $(ARGS)

speedrun: $(VENV)/run
	$(BIN)/python tests/speedrun.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info

.PHONY: demo test bench speedrun clean
