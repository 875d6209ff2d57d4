# docker build -t consistency .                             torch for the CPU
# docker build --build-arg DEVICE=cuda -t consistency .     torch with its CUDA libraries; the machine needs the driver alone
# docker run --rm -v "$PWD/runs:/consistency/runs" consistency python src/train.py mode=ect data=digits
# With a GPU and its container toolkit: docker run --rm --gpus all --shm-size 8g ...
FROM python:3.12-slim

ARG DEVICE=cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /consistency
COPY requirements.lock ./
RUN pip install --no-cache-dir "$(grep -o '^uv==[0-9.]*' requirements.lock)"
# The CPU builds of PyTorch's own index have the versions of the lock, but other hashes, and need no CUDA libraries.
RUN set -eu; \
    if [ "$DEVICE" = cuda ]; then \
        uv pip install --system --no-cache --require-hashes -r requirements.lock; \
    elif [ "$DEVICE" = cpu ]; then \
        sed -n 's/^\([a-z0-9][^\\]*[^ \\]\) *\\*$/\1/p' requirements.lock \
            | grep -Ev '^(cuda-|nvidia-|triton==)' > /tmp/pins.txt; \
        uv pip install --system --no-cache --torch-backend cpu -r /tmp/pins.txt; \
    else \
        echo "expected DEVICE=cpu or cuda; got $DEVICE" >&2; exit 2; \
    fi
COPY . .
RUN uv pip install --system --no-cache --no-deps --no-build-isolation -e .
CMD ["python", "-m", "consistency", "--version"]
