# Everything sets itself up: rustup's toolchain, a C compiler and Python >= 3.10 are enough.
VENV ?= .venv
export CARGO_BUILD_JOBS ?= 2

BIN := $(VENV)/bin
FEATURES := --features radix_mlp/server
# nextest where it is installed, plain `cargo test` elsewhere.
RUST_TESTS := $(shell cargo nextest --version >/dev/null 2>&1 && echo nextest run || echo test --tests --bins --lib)

.PHONY: demo test lint rust-test doc python-test python cuda-bundle bench bench-gpu fuzz clean

demo:
	cargo run --release --quiet -p radix_mlp --features cli -- demo

test: lint rust-test doc python-test

lint: $(VENV)/installed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(FEATURES) -- -D warnings
	cargo clippy -p radix_mlp --lib -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Tests compare the model with transformers, so they run the virtual environment's Python.
rust-test: $(VENV)/installed
	RADIX_MLP_PYTHON=$(abspath $(BIN)/python) cargo $(RUST_TESTS) --workspace $(FEATURES)
	cargo test --quiet --doc --workspace $(FEATURES)

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps -p radix_mlp -p radix_mlp_kernels $(FEATURES)

# A process a core, each of one thread: most tests compute too little to share it.
python-test: python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The extension module, built in release: its tests and benchmarks time calls of microseconds.
python: $(VENV)/installed
	PIP_QUIET=1 VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet

$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --group dev
	touch $@

# The command, the tests and the benchmarks that need a GPU, for a machine that has one; this one needs none.
cuda-bundle:
	python3 kernels/bundle.py target/cuda target/cuda-bundle

# Minutes of measuring on an idle machine; rewrites the JSON results and plots in benchmark/.
bench: python
	$(BIN)/python benchmark/real_batches.py
	cargo bench -p radix_mlp --bench fold
	$(BIN)/python benchmark/fold_vs_published.py
	$(BIN)/python benchmark/cpu_forward/run.py
	$(BIN)/python benchmark/scheduler/simulate.py
	$(BIN)/python benchmark/rest/run.py
	$(BIN)/python train/grpo.py
	$(BIN)/python benchmark/summary.py

# Servers side by side on a GPU: of 8B, fewer fit.
REST_GPU := $(BIN)/python benchmark/rest/run.py --binary target/cuda-bundle/radix-mlp --device cuda:0 --dtype bf16 \
	--template reranker --words 0 --requests 48 --prefixes 64 256 1024 --own 64

# The same on a CUDA GPU, an H200 for the committed results.
bench-gpu: python cuda-bundle
	$(BIN)/python benchmark/gpu_forward/batches.py
	$(BIN)/python benchmark/gpu_forward/measure.py --batches-file target/gpu_batches.json
	$(BIN)/python benchmark/gpu_forward/plot.py
	$(BIN)/python benchmark/gpu_attention/measure.py --batches-file target/gpu_batches.json
	$(BIN)/python benchmark/gpu_attention/measure.py --plot
	$(BIN)/python benchmark/gpu_attention/fit.py
	$(BIN)/pip install --quiet --no-deps -r benchmark/gpu_training/measure.requirements.txt
	$(BIN)/python benchmark/gpu_training/measure.py --batches-file target/gpu_batches.json
	$(BIN)/python benchmark/gpu_training/plot.py
	$(BIN)/python benchmark/gpu_training/gradients.py
	$(BIN)/python benchmark/gpu_kernels/measure.py --bundle target/cuda-bundle --batches-file target/gpu_batches.json
	$(BIN)/python benchmark/gpu_kernels/plot.py
	$(BIN)/python benchmark/gpu_forward/report.py --write
	$(REST_GPU) --shape 0.6b --concurrency 64 --requests 86 --sweep-requests 256 \
		--out benchmark/results/rest_gpu_0.6b.json
	$(REST_GPU) --shape 4b --out benchmark/results/rest_gpu_4b.json
	$(REST_GPU) --shape 8b --out benchmark/results/rest_gpu_8b.json --without sentence-transformers \
		--without "none, 65536" --without "mlp, 65536" --without "full, 65536"
	$(BIN)/python benchmark/summary.py

# Needs a nightly toolchain and `cargo install cargo-fuzz`.
fuzz:
	cd package && cargo +nightly fuzz run fold -- -max_total_time=60

clean:
	rm -rf target $(VENV)
