# An image with the package, the training scripts and their requirements.
#
#   docker build -t moreh .
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/moreh/runs" moreh python train_gpt.py --config configs/gpt.yaml
#
# By default torch is the wheel of the package index, which on Linux is a build for CUDA. For ROCm, or for the torch of
# another image, start from an image that has torch and keep it:
#
#   docker build -t moreh --build-arg BASE=rocm/pytorch:latest --build-arg KEEP_TORCH=yes .
#   docker run --device /dev/kfd --device /dev/dri --shm-size 16g moreh python train_gpt.py --config configs/gpt.yaml
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG KEEP_TORCH=no
WORKDIR /moreh
COPY . .
RUN if [ "$KEEP_TORCH" = yes ]; then sed -i '/^torch==/d' requirements.txt; fi \
    && python -m pip install --no-cache-dir -r requirements.txt peft \
    && python -m pip install --no-cache-dir --no-deps -e .
CMD ["moreh-smi"]
