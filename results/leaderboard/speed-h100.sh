#!/usr/bin/env bash
# What speed-h100.csv holds, as leaderboard.csv of the folder OUT. In the repository root, on an H100 with flash-attn-4, about 7 minutes:
#   bash results/leaderboard/speed-h100.sh OUT books.jsonl
# Called again it goes on where it stopped.
set -e
out=${1:?folder for the results}; books=${2:?text with a document of 8k tokens or more}; run="python run_bench.py --suites speed --out $out"
mkdir -p "$out"
[ -f "$out/layer15.safetensors" ] ||  # another capture would be another input
  python -m sparsebench.suites.capture --model smollm2-135m --data "file:$books" --ctx 8k --layer 15 --out "$out/layer15.safetensors"
$run --tasks attention,kernel_64x64,kernel_128x64,kernel_128x128,block_map --methods seer:nz_ratio=0.1,last_dense=0 seer:nz_ratio=0.1 \
  --ctx 8k,32k,128k
$run --tasks kernel_64x64,kernel_64x64_shared,kernel_128x128 --density 0.1,0.5 --ctx 32k --backward
$run --tasks kernel_64x64,kernel_128x128 --density 0.1 --ctx 8k --qkv "$out/layer15.safetensors"
$run --tasks kernel_64x64,kernel_128x128 --density 0.25,0.05,0.02 --ctx 32k
