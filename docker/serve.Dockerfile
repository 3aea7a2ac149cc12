# A service for one exported model, without PyTorch.
#
#   docker build -f docker/serve.Dockerfile -t ulsam-serve .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 8000:8000 -e ULSAM_API_KEY=KEY \
#       -v "$PWD/model.onnx:/model.onnx:ro" ulsam-serve
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv --without-pip /opt/ulsam \
    && pip --python /opt/ulsam install --no-cache-dir -c constraints.txt -r docker/serve.txt \
    && pip --python /opt/ulsam install --no-cache-dir --no-deps .

FROM python:3.11-slim
COPY --from=build /opt/ulsam /opt/ulsam
ENV PATH=/opt/ulsam/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ulsam", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model.onnx"]
