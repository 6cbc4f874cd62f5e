# Triton with the default model, from the root of the repository:
#   docker build -f docker/triton.Dockerfile -t saccade-triton .
# A volume over /opt/saccade/model_repository serves other models.

# The release whose server, 2.51.0, the tests run.
ARG TRITON=nvcr.io/nvidia/tritonserver:24.10-py3

FROM ${TRITON}
COPY docker/healthcheck.py /usr/local/bin/
COPY model_repository /opt/saccade/model_repository
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1
# Inference and model control: for the gateway alone, never for a public network.
EXPOSE 8001
# Metrics.
EXPOSE 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=15s --start-period=300s --retries=3 \
    CMD ["python3", "-IS", "/usr/local/bin/healthcheck.py", "http://127.0.0.1:8000/v2/health/ready"]
USER 10001:10001
ENTRYPOINT ["tritonserver"]
# The gateway loads what it serves (explicit). A candidate that does not load must neither end the server nor make it
# unready: a gateway's own readiness is an inference by the model it serves. HTTP is for the health check alone.
CMD ["--model-repository=/opt/saccade/model_repository", \
     "--model-control-mode=explicit", "--load-model=*", "--disable-auto-complete-config", \
     "--exit-on-error=false", "--strict-readiness=false", "--exit-timeout-secs=30", \
     "--http-address=127.0.0.1", "--http-port=8000", "--grpc-port=8001", \
     "--metrics-address=0.0.0.0", "--metrics-port=8002"]
