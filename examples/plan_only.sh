#!/bin/sh
# How Llama-3-70B would be trained on 64 devices, and on 96 with a larger batch: no GPU, no network, a second each.
cd "$(dirname "$0")/.." || exit
python train_llama3_70b.py --plan-only accelerator.model=8xLarge.4096GB
python train_llama3_70b.py --plan-only accelerator.model=12xLarge.6144GB train.batch_size=768
