# Training, evaluation and export, from the root of the repository:
#   docker build -f docker/training.Dockerfile -t saccade-training .
#   docker build -f docker/training.Dockerfile -t saccade-training --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

# Any base with Python 3.11 or newer and its venv module.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS tools
COPY docker/locks/tools.txt /locks/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /tools && /tools/bin/pip install --no-cache-dir --no-deps --require-hashes -r /locks/tools.txt
COPY docker/environment docker/sbom.py /tools/

FROM tools AS environment
# PyTorch's build: PyPI's is for CUDA and brings its libraries along, pinned by itself; other indices have the others.
ARG TORCH=2.13.0
ARG TORCH_INDEX=
COPY docker/locks/training.txt /locks/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /tools/environment packages /locks/training.txt && /tools/environment torch "${TORCH}" "${TORCH_INDEX}"
COPY LICENSE README.md pyproject.toml /src/
COPY saccade /src/saccade
COPY server /src/server
COPY training /src/training
COPY model_repository /src/model_repository
RUN /tools/environment saccade && /tools/bin/python /tools/sbom.py /opt/saccade --models /src/model_repository

FROM ${BASE}
COPY --from=environment /opt/saccade /opt/saccade
COPY model_repository /opt/saccade/model_repository
COPY training/configs /opt/saccade/configs
ENV HOME=/tmp \
    PATH=/opt/saccade/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SACCADE_MODEL_REPOSITORY=/opt/saccade/model_repository
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["saccade"]
CMD ["train", "--help"]
