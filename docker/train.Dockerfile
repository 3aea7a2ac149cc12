# Everything but the service: training, comparison, slimming, export. With a compiler, which torch.compile needs, too.
#
#   docker build -f docker/train.Dockerfile -t ulsam .
#   docker run --gpus all --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/work" ulsam train images --out runs/mine
#
# On a machine without a GPU the image is smaller by some gigabytes with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
    -c /tmp/constraints.txt torch torchvision
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "ulsam[train,onnx] @ file://$(echo /wheels/*.whl)"
ENV PYTHONUNBUFFERED=1 HOME=/tmp
USER 65532:65532
WORKDIR /work
ENTRYPOINT ["ulsam"]
CMD ["--help"]
