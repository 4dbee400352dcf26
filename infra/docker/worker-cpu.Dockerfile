# Workers without a GPU, for Dataflow and for the worker pools beside Flink and Spark. From the repository's root:
#   docker build -f infra/docker/worker-cpu.Dockerfile -t IMAGE .
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11.14-slim-bookworm

# PyTorch's own index of torch's CPU wheels, beside the index in use; empty where that serves them (see README.md here).
ARG TORCH_WHEELS="https://download.pytorch.org/whl/cpu"

# Models are in the image: a hub is never asked. Beam's boot would install into a new environment at every start.
# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    HOME=/tmp \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    TOKENIZERS_PARALLELISM=false

WORKDIR /build

# The layers go from what changes least to what changes most: a change of the code is a pull of kilobytes.
COPY constraints.txt pyproject.toml README.md ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_WHEELS:+--extra-index-url "$TORCH_WHEELS"} torch
RUN mkdir featurestore jobs pipelines \
    && pip install --no-cache-dir -c constraints.txt '.[run,dataflow]'

COPY featurestore featurestore
COPY jobs jobs
COPY pipelines pipelines
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Not beside the sources, which it would import in place of what is installed.
COPY infra/docker/check_image.py /check/
WORKDIR /
RUN pip check && python /check/check_image.py cpu

COPY --from=beam /opt/apache/beam /opt/apache/beam

# No USER: Dataflow mounts its folders as root's. Elsewhere run it as anyone (docker run --user 65534): it writes to /tmp alone.
ENTRYPOINT ["/opt/apache/beam/boot"]
