#!/usr/bin/env bash
# The claims table of docs/seer.md: trains a gate, compares it, extends the model to 32k. In the repository root, on a GPU:
#   bash results/leaderboard/seer.sh OUT books.jsonl proofs.jsonl [STEP ...]
# Steps, all by default: windows gates extend lengths long methods. Those after `gates` read the gate that is shipped. Called again
# it goes on where it stopped.
set -e
out=${1:?folder for the results}; books=${2:?corpus}; proofs=${3:?corpus}; shift 3
b=file:$books; data=$b,$b,$b,$b,$b,$b,$b,$b,file:$proofs
shipped=methods/seer/gates/smollm2-135m
run() { python run_bench.py --out "$out/bench" --limit 12 "$@"; }
corpora() { echo "--corpus file:$out/books-$1.jsonl file:$out/proofs-$1.jsonl --ctx $1"; }

windows() { # the documents kept for evaluation, cut into pieces of 8k and 32k tokens, so that intervals are over pieces
  mkdir -p "$out"
  python - "$out" "$books" "$proofs" <<'PY'
import json
import sys

from sparsebench.models import zoo

out, *sources = sys.argv[1:]
tokenizer = zoo.load("smollm2-135m", device="cpu").tokenizer
for name, source in zip(("books", "proofs"), sources):
    docs = [json.loads(line) for line in open(source)]
    held = [(doc, tokenizer(doc["text"], return_offsets_mapping=True)["offset_mapping"]) for doc in docs if doc["split"] == "eval"]
    for length, tokens in (("8k", 8192), ("32k", 32768)):
        size = tokens + 16  # cut out, a piece may have a few tokens less
        pieces = [
            {**doc, "id": f"{doc['id']}-{n}", "text": doc["text"][offsets[n * size][0] : offsets[(n + 1) * size - 1][1]]}
            for doc, offsets in held
            for n in range(len(offsets) // size)
        ]
        pieces = pieces[:: max(len(pieces) // 12, 1)][:12]
        for_knobs = [doc for doc in docs if doc["split"] == "train"][:2]
        with open(f"{out}/{name}-{length}.jsonl", "w") as file:
            file.writelines(json.dumps(doc) + "\n" for doc in pieces + for_knobs)
        print(f"{name}: {len(pieces)} pieces of {length}")
PY
}
gates() { # row_mass is the one shipped
  for loss in row_mass mass max; do
    [ -f "$out/$loss/config.json" ] ||
      python -m sparsebench.methods.seer.distill --model smollm2-135m --data "$data" --ctx 8k --gate-type Qmaxminavg_Kmaxminavg \
        --gate-dim 64 --loss $loss --out "$out/$loss"
  done
}
lengths() {
  run --suites perplexity $(corpora 8k),4k,2k,1k --density 0.5,0.2,0.1 --methods dense \
    seer:last_dense=0 seer:last_dense=0,min_blocks=3 seer:last_dense=0,nz_ratio=0.1
}
methods() {
  run --suites perplexity,fidelity $(corpora 8k) --density 0.5,0.25,0.1,0.05 --versus "seer(last_dense=0, min_blocks=3)" \
    --methods all oracle:threshold=0.001 {seer:,"seer:gate=$out/mass,","seer:gate=$out/max,"}last_dense=0{,",min_blocks=3"}
}
extend() {
  for arm in dense 0.5 0.1; do
    [ -f "$out/$arm/training.json" ] ||
      python -m sparsebench.methods.seer.extend --model smollm2-135m --data "$data" --rope yarn --factor 4 --ctx 32k --steps 100 \
        --out "$out/$arm" $([ $arm = dense ] || echo --density $arm)
  done
}
long() {
  seer=diagonal=true,last_dense=0
  run --suites perplexity $(corpora 32k) --models "$out/dense" --density 0.5,0.2,0.1 \
    --methods dense "seer:gate=$shipped,$seer" "seer:gate=$shipped,$seer,nz_ratio=0.1"
  for arm in 0.5 0.1; do
    run --suites perplexity $(corpora 32k) --models "$out/$arm" --density $arm \
      --methods dense "seer:gate=$out/$arm/gate,$seer" "seer:gate=$out/$arm/gate,$seer,budget=16"
  done
}
for step in ${*:-windows gates extend lengths long methods}; do $step; done
