# The image for job_rdma.yaml, and for every job when preparing data or watching TensorBoard:
# what the public PyTorch image lacks. The repository itself is not in it: the jobs mount it.
#
#     docker build -t REGISTRY/nanogpt:torch-2.13.0 .
#     docker build -t REGISTRY/nanogpt:torch-1.13.1 --build-arg TORCH=1.13.1-cuda11.6-cudnn8 .
ARG TORCH=2.13.0-cuda12.6-cudnn9
FROM pytorch/pytorch:${TORCH}-devel

# NCCL finds RDMA cards through libibverbs and a driver for each kind of card; with apt, so that
# they fit the base image's system.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ibverbs-providers ibverbs-utils libibverbs1 librdmacm1 \
 && rm -rf /var/lib/apt/lists/*

# The base image's numpy is what its torch was built for: keep it.
RUN python -c "import numpy; print(f'numpy=={numpy.__version__}')" > /tmp/keep.txt \
 && PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir -c /tmp/keep.txt \
        datasets==5.2.0 huggingface_hub==2.4.0 safetensors==0.8.0 tensorboard==2.21.0 \
        tiktoken==0.14.0 tqdm==4.70.1
