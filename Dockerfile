# GPU, built on any machine:  docker build -t mssr .
# CPU:                        docker build -t mssr-cpu --build-arg BASE=debian:bookworm-slim --build-arg VLLM= .
# docs/INSTALL.md says how to run them.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

# Triton, DeepSpeed and vLLM compile kernels on first use: hence the compilers and, on a GPU, the image with nvcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mssr
COPY . .
ARG VLLM=--cuda
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_CACHE_DIR=1
RUN make venv VLLM="${VLLM}"
ENV PATH="/opt/mssr/.venv/bin:${PATH}"

WORKDIR /work
ENV HF_HOME=/work/.huggingface
CMD ["mssr", "doctor"]
