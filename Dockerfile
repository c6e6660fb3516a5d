# fastvit-train for CPUs and GPUs.
#
#   docker build -t fastvit-train .
#   docker run --rm --gpus all --shm-size=8g -v "$PWD:/work" --user "$(id -u):$(id -g)" fastvit-train train
#
# The wheels of PyTorch bring CUDA's libraries, Triton brings its assembler, and `--gpus all` brings the driver: the
# default base is enough for a GPU too. Take one of CUDA's own for other programs that need its libraries, such as
#
#   docker build -t fastvit-train --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE=python:3.12-slim
# hadolint ignore=DL3006
FROM ${BASE}

# The attention, the blocks and Muon's step on CPUs are C++ that is compiled when it is first used; torch.compile and
# Triton need a compiler too, and Triton the headers of Python. A base without Python gets that of its distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && if ! command -v python3; then apt-get install --yes --no-install-recommends python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --create-home --home-dir /work fastvit

ENV PATH=/opt/fastvit/bin:$PATH
WORKDIR /src
# Further indexes, such as PyTorch's with wheels for CPUs alone, which are much smaller.
ARG PIP_EXTRA_INDEX_URL

# The dependencies are a layer of their own: a change of the code does not download them again.
COPY pyproject.toml ./
RUN python3 -m venv /opt/fastvit \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt

COPY README.md LICENSE ./
COPY fastvit_train fastvit_train
COPY kernels/fastvit_kernels kernels/fastvit_kernels
RUN pip install --no-cache-dir --no-deps .

# data/, runs/ and the caches are here. `docker run --user` may name a user that the image does not know.
ENV HOME=/work USER=fastvit
WORKDIR /work
VOLUME ["/work"]
USER 10001
ENTRYPOINT ["fastvit"]
