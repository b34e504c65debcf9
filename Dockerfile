# doralib on an NVIDIA GPU:
#   docker build -t doralib .
#   docker run --gpus all -v "$PWD:/work" -v doralib-cache:/root/.cache doralib train recipe.yaml
# Written from the documentation of its parts. It has not been built or run: no Docker and no GPU were at hand.
FROM ubuntu:24.04
# the machine's driver comes from the NVIDIA container toolkit, everything else of CUDA with torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# gcc and Python's headers: Triton compiles the launcher of each kernel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/doralib/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/doralib

WORKDIR /src
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY src src
# torch from PyPI is the CUDA build, and asks for a triton of its own
RUN sed -i '/^triton==/d' constraints.txt && pip install '.[all,quant,rl]' --constraint constraints.txt

WORKDIR /work
ENTRYPOINT ["doralib"]
CMD ["--help"]
