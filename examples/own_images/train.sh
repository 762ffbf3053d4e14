#!/usr/bin/env bash
# From a folder of images to a model that draws and answers: the commands of docs/training.md, one after another.
#
#   bash examples/own_images/train.sh
#
# It reads photos/ (images, each with a text of its name beside it), prose.txt and prompts.txt in the current folder and
# writes to data/mine and outputs/. Started again, it goes on: finished steps are short, trainings continue.
# TOKENIZER_SETTINGS and TRAINING_SETTINGS may hold further settings of the two trainings, such as
# training.max_train_steps=1000.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# bf16 is twice as fast on processors that have it, and twenty times slower on others.
grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && PRECISION=bf16 || PRECISION=no
TOKENIZER="training.mixed_precision=$PRECISION ${TOKENIZER_SETTINGS:-}"
TRAINING="training.mixed_precision=$PRECISION ${TRAINING_SETTINGS:-}"
set -x

python3 $ROOT/tools/make_shards.py source=photos output=data/mine/train holdout=0.05
python3 $ROOT/tools/small_llm.py corpus=prose.txt output_dir=outputs/mine-llm vocab_size=800
python3 $ROOT/training/train_magvitv2.py config=configs/showo_tiny_magvitv2.yaml experiment.output_dir=outputs/mine-vq \
    'dataset.params.train_shards=data/mine/train-*.tar' 'dataset.params.eval_shards=data/mine/train_heldout-*.tar' $TOKENIZER
python3 $ROOT/tools/encode_images.py 'shards=data/mine/train-*.tar' output=data/mine/codes \
    vq_model_name=outputs/mine-vq resolution=64
accelerate launch --config_file $ROOT/accelerate_configs/1_cpu.yaml --quiet $ROOT/training/train.py \
    config=configs/showo_tiny_stage2.yaml experiment.init_from=null output_dir=outputs/mine \
    model.showo.llm_model_path=outputs/mine-llm model.vq_model.vq_model_name=outputs/mine-vq \
    dataset.params.train_lm_shards_path_or_url=prose.txt \
    'dataset.params.train_t2i_shards_path_or_url=data/mine/codes-*.tar' \
    'dataset.params.train_mmu_shards_path_or_url=data/mine/codes-*.tar' \
    'dataset.params.eval_t2i_shards_path_or_url=data/mine/train_heldout-*.tar' \
    'dataset.params.eval_mmu_shards_path_or_url=data/mine/train_heldout-*.tar' \
    validation_prompts_file=prompts.txt $TRAINING
python3 $ROOT/tools/plot.py runs=outputs/mine output=outputs/mine/curves.png
python3 $ROOT/tools/export.py from=outputs/mine to=outputs/mine-bf16 dtype=bf16
python3 $ROOT/inference_t2i.py config=outputs/mine/config.yaml model.showo.pretrained_model_path=outputs/mine-bf16 \
    mode=t2i validation_prompts_file=prompts.txt output_dir=outputs/mine-images
python3 $ROOT/inference_mmu.py config=outputs/mine/config.yaml model.showo.pretrained_model_path=outputs/mine-bf16 \
    mmu_image_root=photos question=null output_dir=outputs/mine-captions
