# A stand-in for NVIDIA's Triton image where its registry cannot be reached, for tests: the server from its PyPI wheel,
# and backends in Python that take the places of ONNX Runtime's and LibTorch's. docker/build-local builds it.

# Python 3.11 or 3.12 on x86-64, with its shared library.
ARG BASE

FROM ${BASE} AS unpacked
WORKDIR /unpacked
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/models \
    && /opt/models/bin/pip download --no-cache-dir --no-deps --dest /wheel nvidia-pytriton==0.7.0 \
    && python3 -m zipfile --extract /wheel/*.whl . \
    && /opt/models/bin/pip install --no-cache-dir --no-compile 'numpy==1.26.4' 'onnxruntime==1.31.1'
COPY tests/triton/backends pytriton/tritonserver/backends
RUN server=pytriton/tritonserver \
    && stub="python_backend_stubs/$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')/triton_python_backend_stub" \
    && chmod 755 "$server/bin/tritonserver" "$server/$stub" \
    && ln -s "../../$stub" "$server/backends/python/triton_python_backend_stub"

FROM ${BASE}
COPY --from=unpacked /unpacked/pytriton/tritonserver /opt/tritonserver
COPY --from=unpacked /unpacked/nvidia_pytriton.libs /opt/tritonserver/lib
COPY --from=unpacked /opt/models /opt/models
# The first python3 is that of the models; NumPy 2 would corrupt their tensors.
ENV PATH=/opt/models/bin:/opt/tritonserver/bin:$PATH LD_LIBRARY_PATH=/opt/tritonserver/lib
