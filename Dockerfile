# The server in a container. CPU:
#   docker build -t sfumato .
# PyTorch's default build for x86-64 includes CUDA, so the same image works on a GPU (`docker run --gpus all`). For a smaller
# image without CUDA pass an index with CPU builds; for another CUDA release, that release's index:
#   docker build --build-arg TORCH_INDEX=URL -t sfumato .
FROM python:3.11-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/sfumato

# PyTorch first: it is the largest layer and changes least often.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
COPY pyproject.toml MANIFEST.in requirements.txt README.md LICENSE NOTICE ./
COPY src ./src
# The server's dependencies at the tested versions; test tools in that list are not installed.
RUN pip install --constraint requirements.txt .

# Model files and weights, generated pictures, and the hub's cache.
ENV SFUMATO_HOST=0.0.0.0 \
    SFUMATO_MODELS=/models \
    SFUMATO_DATA=/data \
    HF_HOME=/cache
RUN useradd --create-home sfumato && mkdir -p /models /data /cache && chown sfumato /models /data /cache
USER sfumato
VOLUME ["/models", "/data", "/cache"]
EXPOSE 8080

HEALTHCHECK --interval=30s --timeout=5s --retries=5 \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"
CMD ["sfumato", "serve"]
