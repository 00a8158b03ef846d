#!/usr/bin/env bash
# The comparison of docs/experiments.md, section 4, from raw data to the report, with today's start of the head. Two CPU cores:
# ten hours or less, reckoned from its parts; in one go it was run on phantoms only, with fewer steps (by a test).
#
#   export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...     with Dataset500 and Dataset501 in nnUNet_raw
#   cd a folder to work in; bash .../docs/few_labels/run.sh
#
# Stopped, it goes on where it was when started again. Networks stay in nnUNet_results, the pre-trained
# encoders in weights/; archive.py makes runs.tar.xz and report*/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export OMP_WAIT_POLICY=PASSIVE # two processes share two cores
# glibc keeps what was freed instead of giving it back to the system and asking anew in every step
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# Stopped between trainings or in the comparisons, it stops what it started.
trap 'exit 130' INT TERM
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

# 1. Data at 5 mm. nnU-Net's own planning and preprocessing for the labelled set.
hiendmae_plan_and_preprocess -d 500 -spacing 5 5 5 -p HiEndMAE5mmPlans
[ -e "$nnUNet_preprocessed"/Dataset501_OpenKBP/all_cases_at_5mm ] || {
  nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -overwrite_target_spacing 5 5 5 -overwrite_plans_name nnUNet5mmPlans
  touch "$nnUNet_preprocessed"/Dataset501_OpenKBP/all_cases_at_5mm
}

# 2. Two pre-trainings that differ in the decoder alone, and both for longer.
pretrain() { # run name, decoder, steps
  local run=$nnUNet_results/Dataset500_OpenKBPUnlabelled/HiEndMAE__HiEndMAE5mmPlans__3d_fullres/$1
  [ -f "$run/checkpoint_final.pth" ] || hiendmae_pretrain -d 500 -p HiEndMAE5mmPlans -preset nano -device cpu -run "$1" \
    -lr 1.5e-3 -warmup_steps "$(($3 / 100))" -weight_init published \
    -decoder "$2" --no_augmentation -steps "$3" -val_every 250 -preview_epochs 0 -num_workers 1 -log_every 50 \
    -num_gpus 2 $([ -f "$run/checkpoint_latest.pth" ] && echo --c)
  mkdir -p weights && cp "$run/encoder_weights.pth" "weights/$1.pth"
}
pretrain hi hierarchical 4000
pretrain mae self_attention 4000
pretrain hi10k hierarchical 10000
pretrain mae10k self_attention 10000

# 3. 4 arms × 1, 4, 16 labels × 3 label subsets; 4 arms × 4 labels × 3 subsets for three times as long; and so long,
#    with augmentation and the longer pre-trainings, 5 arms × 1, 4 labels × 3 subsets. Two trainings at a time.
#    The reports name what failed or is missing, and the script then ends with 1.
export OMP_NUM_THREADS=1 nnUNet_def_n_proc=1 nnUNet_n_proc_DA=0 # only from here on: nnU-Net's planning refuses 0
compare() { # folder, grid
  hiendmae_benchmark plan -o "$1" -grid "$here/$2"
  for part in 0 1; do
    hiendmae_benchmark run -o "$1" -part_id "$part" -num_parts 2 &
  done
  wait
  hiendmae_benchmark report -o "$1" || failed=1
}
failed=0
compare few_labels grid.json
compare few_labels_long grid_long.json
compare few_labels_augmented grid_augmented.json
exit "$failed"
