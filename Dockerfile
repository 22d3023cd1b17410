# Two images. CPU:     docker build --target cpu  --tag purld:cpu  .
#             NVIDIA:  docker build --target cuda --tag purld:cuda .     (run with --gpus all)
# Models, data and runs are mounted: docker run --rm --user "$(id -u)" --volume "$PWD:/work" purld:cpu check run.yaml
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV HOME=/home/purld PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Libraries keep caches at home, for whichever user the container runs as.
RUN mkdir --mode=1777 /home/purld /work
WORKDIR /work
COPY constraints.txt /constraints.txt
COPY --from=wheel /wheels /wheels
ENTRYPOINT ["purld"]
CMD ["--help"]

# The CUDA libraries come with torch; the host needs NVIDIA's driver and container toolkit.
FROM base AS cuda
RUN pip install --constraint /constraints.txt "$(ls /wheels/*.whl)[math,gguf]"
USER 1000

# 2.13.0+cpu of PyTorch's own index is taken before 2.13.0 of PyPI.
FROM base AS cpu
RUN pip install --constraint /constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    "$(ls /wheels/*.whl)[math,gguf]"
USER 1000
