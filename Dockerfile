# All commands of mfm_nnunet, in the versions of requirements.lock. Data come in through /data, the current folder inside.
#   docker build -t mfm_nnunet .                                                            NVIDIA GPUs, and CPUs
#   docker build -t mfm_nnunet:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX=URL .     CPUs alone; URL: PyTorch's
#                                                                                           index of CPU wheels
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/data" mfm_nnunet mfm_doctor
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG DEVICE=cuda
ARG TORCH_INDEX=""

# gcc: torch.compile builds kernels with it on GPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mfm_nnunet
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY setup_scripts/install_locked.sh setup_scripts/
COPY mfm_nnunet mfm_nnunet
RUN bash setup_scripts/install_locked.sh "${DEVICE}" "${TORCH_INDEX}"

# Any user may run it: caches are where everybody may write, downloads where they are kept.
ENV HOME=/tmp \
    HF_HOME=/data/.cache/huggingface \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 mfm
USER mfm
WORKDIR /data
CMD ["mfm_doctor"]
