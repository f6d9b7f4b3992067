#!/usr/bin/env bash
# The trials of docs/pretraining_study.md, "What was wrong in the demo", an hour a seed on two cores:
#
#     python -m eve_ds.demo --seed 0 --out runs/demo0
#     bash docs/demo_trials.sh 0 2>&1 | tee trials.log
#     grep -E '^(==|test:)|patch shape|class token: top' trials.log
#
# It takes more seeds, each with its demo. The words' losses are in runs/trials0/*/pretrain/metrics.jsonl. The old captions are drawn by
# the code of that time: the repository's history is needed.
set -euo pipefail

small='{"dim": 64, "num_heads": 4, "mlp_hidden": 128}'
small_short='{"dim": 64, "num_heads": 4, "mlp_hidden": 128, "max_text_length": 24, "text_positions": 24}'
changed=$(git log -1 --format=%h --grep '^Grounding is measured in validation')
[ "$changed" ] || { echo "error: no commit 'Grounding is measured in validation' here; clone with the whole history" >&2; exit 2; }
options=(--engine.expert_parallel_size 2 --deepspeed_config ds_configs/zero2.json --logging.wandb false)

# The demo as it was when these trials were made: 8 attention heads, 1,200 steps, and a matching head that stayed at its prior.
retrieval=(--config eve_ds/configs/tiny_shapes_itr.yaml --task itr_coco --optimizer.schedule linear --engine.global_batch_size 64)
retrieval+=(--objective.even_negatives 0 --objective.matching_weight 1 --objective.rerank false)

run() { # module, options: on two ranks
    deepspeed --num_gpus 2 --log_level error --module "$@" "${options[@]}"
}

model() { # the demo's model of that time with these changes, as JSON
    python -c 'import json, sys, yaml
recipe = yaml.safe_load(open("eve_ds/configs/tiny_shapes.yaml"))
print(json.dumps(recipe["model"] | {"num_heads": 8} | json.loads(sys.argv[1])))' "$1"
}

probe() { # run
    python -m eve_ds.bench probe --checkpoint "$1" --data "$demo/data/captions" --scenes "$demo/raw/annotations" --images 6000
}

convert() { # raw files, out: caption shards
    for split in train val test; do
        python -m preprocessing coco --annotations "$1/annotations/captions_${split}2014.json" --images "$1/images" --split $split --out "$2"
    done
}

finetune() { # name, then where it starts: 500 steps of VQA, the demo's retrieval
    echo "== $1, seed $seed: VQA, retrieval"
    run eve_ds.finetune --config eve_ds/configs/tiny_shapes_vqa.yaml --task vqa --optimizer.total_steps 500 --seed "$seed" \
        --data "$demo/data/vqa" --output_dir "$out/$1/vqa" "${@:2}"
    run eve_ds.finetune "${retrieval[@]}" --optimizer.total_steps 120 --optimizer.lr 1e-3 --seed "$seed" \
        --data "$demo/data/captions" --output_dir "$out/$1/itr" "${@:2}"
}

finetune_long() { # name, captions, then where it starts: retrieval as the old demo had it
    echo "== $1, seed $seed: retrieval, 450 steps at 2e-3, and what the model knows then"
    run eve_ds.finetune "${retrieval[@]}" --optimizer.total_steps 450 --optimizer.lr 2e-3 \
        --seed "$seed" --data "$2" --checkpoint.export true --output_dir "$out/$1/itr450" "${@:3}"
    probe "$out/$1/itr450"
}

trial() { # name, captions, tokenizer, options of the pre-training
    run eve_ds.pretrain --config eve_ds/configs/tiny_shapes.yaml --engine.seed "$seed" --data.path "$2" --data.tokenizer "$3" \
        --output_dir "$out/$1/pretrain" --model "$(model '{}')" --optimizer.total_steps 1200 "${@:4}"
    echo "== $1, seed $seed: probe"
    probe "$out/$1/pretrain"
    finetune "$1" --checkpoint "$out/$1/pretrain"
}

for seed in "$@"; do
    demo=runs/demo$seed out=runs/trials$seed
    captions=$demo/data/captions tokenizer=$demo/tokenizer
    old=$out/old_captions old_tokenizer=$out/old_tokenizer

    mkdir "$out" "$out/old_code" # fails where a run of these trials is
    git archive "$changed~1" | tar -x -C "$out/old_code"
    PYTHONPATH=$out/old_code python -P -m preprocessing shapes --out "$out/old_raw" --seed "$seed" --test 200
    convert "$out/old_raw" "$old"
    python -m preprocessing tokenizer train --data "$old/train" "$demo/data/vqa/train" "$demo/data/nlvr/train" --vocab-size 512 \
        --out "$old_tokenizer"
    python -m preprocessing shapes --out "$out/random_raw" --seed "$seed" --test 200 --order random
    convert "$out/random_raw" "$out/random_captions"
    python - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
(out / "lists_raw/annotations").mkdir(parents=True)
(out / "lists_raw/images").symlink_to((out / "random_raw/images").resolve())
for split in ("train", "val", "test"):
    name = f"annotations/captions_{split}2014.json"
    content = json.loads((out / "random_raw" / name).read_text())
    told = [a for a in content["annotations"] if ":" not in a["caption"] or "objects: " in a["caption"]]
    (out / "lists_raw" / name).write_text(json.dumps(content | {"annotations": told}))
PYTHON
    convert "$out/lists_raw" "$out/lists_captions"

    first=(--init_from null --data.tokenizer)
    finetune first "${first[@]}" "$tokenizer" --model "$(model '{}')"
    finetune first_64 "${first[@]}" "$tokenizer" --model "$(model "$small")"
    finetune first_old "${first[@]}" "$old_tokenizer" --model "$(model "$small_short")"
    trial demo "$captions" "$tokenizer"
    trial few "$captions" "$tokenizer" --optimizer.total_steps 275
    trial batch_64 "$captions" "$tokenizer" --engine.global_batch_size 64 --optimizer.total_steps 2400 --optimizer.lr 2.5e-3
    trial width_64 "$captions" "$tokenizer" --model "$(model "$small")"
    trial random "$out/random_captions" "$tokenizer"
    trial lists "$out/lists_captions" "$tokenizer"
    trial sizes "$old" "$old_tokenizer"
    trial width_64_sizes "$old" "$old_tokenizer" --model "$(model "$small")"
    old_recipe=(--model "$(model "$small_short")" --engine.global_batch_size 64 --optimizer.lr 2.5e-3)
    trial width_64_short "$old" "$old_tokenizer" --model "$(model "$small_short")"
    trial old_2400 "$old" "$old_tokenizer" "${old_recipe[@]}" --optimizer.total_steps 2400
    trial old "$old" "$old_tokenizer" "${old_recipe[@]}" --optimizer.total_steps 550

    finetune_long first "$captions" "${first[@]}" "$tokenizer" --model "$(model '{}')"
    finetune_long demo "$captions" --checkpoint "$out/demo/pretrain"
    finetune_long first_old "$old" "${first[@]}" "$old_tokenizer" --model "$(model "$small_short")"
    finetune_long old "$old" --checkpoint "$out/old/pretrain"
    finetune_long old_2400 "$old" --checkpoint "$out/old_2400/pretrain"
done
