# docker build -t kronecker . && docker run --rm --init --gpus all kronecker python train_dreambooth_kronecker.py --help
FROM python:3.11-slim

# Triton builds what --compile generates with gcc
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# PyPI's torch for Linux brings CUDA's libraries; the driver is the host's
WORKDIR /app
COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement requirements.txt

# The owner of what is written to folders of the host
ARG UID=1000
RUN useradd --create-home --uid "$UID" trainer && install --directory --owner trainer outputs /hub
ENV HF_HOME=/hub
VOLUME /hub

COPY . .
USER trainer
CMD ["python", "train_dreambooth_kronecker.py", "--help"]
