# The image of workers, of the containers they start, and of the MLflow server.
#   docker build -t sft-flows:latest .
# torch comes with CUDA; --build-arg PIP_EXTRA_INDEX_URL=... names an index with another build of it, such as CPU only.
# PREFECT_API_URL, MLFLOW_TRACKING_URI and credentials come with the environment of the container, never with the image.
FROM python:3.11-slim-bookworm

# gcc: the presets with CPU offload compile DeepSpeed's optimizer. tini passes signals on, so that training can save.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git tini && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/sft-flows
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE prefect.yaml ./
COPY cli cli
COPY demo demo
COPY flows flows
COPY recipes recipes
COPY sft_cli sft_cli
COPY sft_core sft_core
COPY tasks tasks
COPY deploy deploy
RUN pip install --no-cache-dir -c constraints.txt ".[s3,postgres]" boto3 prefect-docker prefect-kubernetes

# A user without rights; /project is SFT_PROJECT_DIR: recipes, and rows where they are files.
RUN useradd --create-home --uid 1000 sft && mkdir /project /cache && chown sft /project /cache
USER sft
WORKDIR /project
ENV SFT_PROJECT_DIR=/project DO_NOT_TRACK=true PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["tini", "--"]
CMD ["sft", "--help"]
