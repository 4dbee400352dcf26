# Workers with an NVIDIA GPU: as worker-cpu, with torch's CUDA build on NVIDIA's base. From the repository's root:
#   docker build -f infra/docker/worker-gpu.Dockerfile -t IMAGE .
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

# Ubuntu's own Python is 3.12 and Beam wants the submitter's: the same build of 3.11 as in worker-cpu, which needs no more
# than Debian 12's glibc (2.36; Ubuntu 24.04 has 2.39).
FROM python:3.11.14-slim-bookworm AS python

# `base`, not `runtime`: torch's wheels bring the CUDA libraries that it was built with, and a second set would be 2 GB.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3064
ENV DEBIAN_FRONTEND=noninteractive \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    TOKENIZERS_PARALLELISM=false

# What Python's own modules are linked against; check_image.py imports them all.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
    ca-certificates libbz2-1.0 libffi8 liblzma5 libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 zlib1g \
    && rm -rf /var/lib/apt/lists/*

COPY --from=python /usr/local/bin /usr/local/bin
COPY --from=python /usr/local/lib /usr/local/lib
RUN ldconfig

WORKDIR /build

COPY constraints.txt infra/docker/constraints-gpu.txt pyproject.toml README.md ./
RUN pip install --no-cache-dir -c constraints.txt -c constraints-gpu.txt torch
RUN mkdir featurestore jobs pipelines \
    && pip install --no-cache-dir -c constraints.txt -c constraints-gpu.txt '.[run,dataflow]'

COPY featurestore featurestore
COPY jobs jobs
COPY pipelines pipelines
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Not beside the sources, which it would import in place of what is installed.
COPY infra/docker/check_image.py /check/
WORKDIR /
RUN pip check && python /check/check_image.py gpu

COPY --from=beam /opt/apache/beam /opt/apache/beam

# No USER: see worker-cpu.Dockerfile.
ENTRYPOINT ["/opt/apache/beam/boot"]
