# The flex template's launcher: plans a spec's next stage and hands the job to Dataflow. From the repository's root:
#   docker build -f infra/dataflow/launcher.Dockerfile -t IMAGE .
FROM gcr.io/dataflow-templates-base/python311-template-launcher-base:flex_templates_base_image_release_20260112_RC00

# As worker-cpu's.
ARG TORCH_WHEELS="https://download.pytorch.org/whl/cpu"

# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    FLEX_TEMPLATE_PYTHON_PY_FILE=/template/flex.py \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false

WORKDIR /build

# The same layers as worker-cpu's.
COPY constraints.txt pyproject.toml README.md ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_WHEELS:+--extra-index-url "$TORCH_WHEELS"} torch
RUN mkdir featurestore jobs pipelines \
    && pip install --no-cache-dir -c constraints.txt '.[run,dataflow]'

COPY featurestore featurestore
COPY jobs jobs
COPY pipelines pipelines
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# The launcher runs a file, not a module. It needs no weights' check: it plans, and loads no model.
COPY jobs/flex.py /template/flex.py
WORKDIR /template
RUN pip check && python -c 'import jobs.flex'
