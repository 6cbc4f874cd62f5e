# The gateway, from the root of the repository:
#   docker build -f docker/gateway.Dockerfile --target gateway -t saccade-gateway .     in front of Triton: no engine, no model
#   docker build -f docker/gateway.Dockerfile --target embedded -t saccade-embedded .   its own engine and the default model
# pip's own settings (another index, a certificate) come in with --secret id=pip.conf,src=FILE and stay out of every layer.

# Any base with Python 3.11 or newer and its venv module.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS tools
COPY docker/locks/tools.txt /locks/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /tools && /tools/bin/pip install --no-cache-dir --no-deps --require-hashes -r /locks/tools.txt
COPY docker/environment docker/sbom.py /tools/

FROM tools AS gateway-environment
COPY docker/locks/gateway.txt /locks/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf /tools/environment packages /locks/gateway.txt
COPY LICENSE README.md pyproject.toml /src/
COPY saccade /src/saccade
COPY server /src/server
RUN /tools/environment saccade && /tools/bin/python /tools/sbom.py /opt/saccade

FROM tools AS embedded-environment
COPY docker/locks/embedded.txt /locks/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf /tools/environment packages /locks/embedded.txt
COPY LICENSE README.md pyproject.toml /src/
COPY saccade /src/saccade
COPY server /src/server
COPY model_repository /src/model_repository
RUN /tools/environment saccade && /tools/bin/python /tools/sbom.py /opt/saccade --models /src/model_repository

FROM ${BASE} AS runtime
# A server installs nothing.
RUN rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/bin/pip*
COPY docker/healthcheck.py /usr/local/bin/
# Where a volume for jobs goes (SACCADE_JOBS_FILE): a named one takes its owner from here.
RUN install -d -m 700 -o 10001 -g 10001 /var/lib/saccade
ENV PATH=/opt/saccade/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SACCADE_HOST=0.0.0.0 \
    SACCADE_PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python3", "-IS", "/usr/local/bin/healthcheck.py"]
ENTRYPOINT ["saccade"]
CMD ["serve"]

FROM runtime AS embedded
COPY model_repository /opt/saccade/model_repository
COPY --from=embedded-environment /opt/saccade /opt/saccade
ENV SACCADE_MODEL_REPOSITORY=/opt/saccade/model_repository
USER 10001:10001

FROM runtime AS gateway
COPY --from=gateway-environment /opt/saccade /opt/saccade
ENV SACCADE_BACKEND=triton \
    SACCADE_TRITON_URL=triton:8001
USER 10001:10001
