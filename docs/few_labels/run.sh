#!/usr/bin/env bash
# The comparison on test patients (docs/results.md), from raw data to the report: bash run.sh [cpu|controls|gpu]
#
#   export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...     with Dataset500, 501 and 504 in nnUNet_raw
#   cd a folder to work in; bash .../docs/few_labels/run.sh
#
# cpu: two cores, two and a half hours (the sum of its parts; in one go it ran on phantoms, by a test).
# controls: after cpu, seven hours more: asking the last layer only, a frozen encoder, none at all, nnU-Net given the time
# of Hi-End-MAE's pre-training as well (91 epochs: 29 minutes are 4,600 of its iterations; ResEnc-L 65, an epoch of it
# takes 1.41 times as long), also with one label, and Hi-End-MAE as long. Its encoder may be another than that of cpu:
# equal commands gave two on four machines.
# gpu: one GPU and 16 cores; never run on one. Its sizes are guesses, meant to reach 4 labels in fifteen minutes.
# Stopped, it goes on where it was when started again. Encoders stay in weights/, networks in nnUNet_results.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:-cpu} scale=$kind grids=(test_$kind) pretrainings=(hi:hierarchical mae:self_attention)
plans=(ExperimentPlanner:nnUNet nnUNetPlannerResEncL:nnUNetResEncL)
if [ "$kind" = controls ]; then
  scale=cpu grids=(controls_cpu one_label_cpu) pretrainings=(hi:hierarchical last:last_layer)
fi
case $scale in
  cpu) mm=5 device=cpu jobs=2 workers=1
    sizes="-preset nano -crop_size 24 24 24 -batch_size 8 -steps 10000 --no_augmentation" ;;
  gpu) mm=3 device=cuda jobs=12 workers=6
    sizes="-preset tiny -vit_patch_size 4 4 4 -crop_size 48 48 48 -batch_size 64 -steps 3000" ;;
  *) echo "run.sh: '$kind' must be cpu, controls or gpu" >&2 && exit 2 ;;
esac
[ "$kind" != cpu ] || plans=("${plans[0]}")
export OMP_WAIT_POLICY=PASSIVE # several processes share the cores
# glibc keeps what was freed instead of giving it back to the system and asking anew in every step
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# Stopped between trainings or in the comparisons, it stops what it started.
trap 'exit 130' INT TERM
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

# 1. Cases without labels, and a data set whose labels are drawn from 501 and whose test cases are 504. nnU-Net plans
#    with 501 alone, so that no intensity of a test case is known.
hiendmae_plan_and_preprocess -d 500 -spacing $mm $mm $mm -p "HiEndMAE${mm}mmPlans"
hiendmae_pack -d 500 -p "HiEndMAE${mm}mmPlans" -o "packed_$scale"
study=$(python "$here/study_data.py")
for planner in "${plans[@]}"; do
  name=${planner#*:}${mm}mmPlans
  [ -e "$study/$name.done" ] && continue
  nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -pl "${planner%:*}" --no_pp \
    -overwrite_target_spacing $mm $mm $mm -overwrite_plans_name "$name"
  nnUNetv2_move_plans_between_datasets -s 501 -t 505 -sp "$name" -tp "$name"
  cp "$nnUNet_preprocessed"/Dataset501_OpenKBP/dataset_fingerprint.json "$study"
  nnUNetv2_preprocess -d 505 -c 3d_fullres -plans_name "$name" -np $jobs
  touch "$study/$name.done"
done

# 2. Two pre-trainings that differ in the decoder alone, side by side.
runs=$nnUNet_results/Dataset500_OpenKBPUnlabelled/HiEndMAE__packed__packed_$scale
for pair in "${pretrainings[@]}"; do
  run=${pair%:*}_$scale
  if [ ! -f "$runs/$run/checkpoint_final.pth" ]; then
    OMP_NUM_THREADS=1 hiendmae_pretrain -packed "packed_$scale" $sizes -device $device -run "$run" -decoder "${pair#*:}" \
      -seed 1 -val_every 500 -log_every 100 -preview_epochs 0 -num_workers $workers \
      $([ -f "$runs/$run/checkpoint_latest.pth" ] && echo --c) &
  fi
done
wait
mkdir -p weights
for pair in "${pretrainings[@]}"; do
  name=${pair%:*}
  [ -f "$runs/${name}_$scale/checkpoint_final.pth" ] || { echo "run.sh: pre-training $name did not finish" >&2; exit 1; }
  cp "$runs/${name}_$scale/encoder_weights.pth" "weights/$name.pth"
done

# 3. Every arm with every label budget and subset, several trainings at a time. The report names what failed or is
#    missing, and the script then ends with 1.
export OMP_NUM_THREADS=1 nnUNet_def_n_proc=1 nnUNet_n_proc_DA=0 # only from here on: nnU-Net's planning refuses 0
export nnUNet_compile=f # compiling can take as long as these trainings (docs/experiments.md, section 5)
for grid in "${grids[@]}"; do
  hiendmae_benchmark plan -o "few_labels_$grid" -grid "$here/grid_$grid.json"
  for ((job = 0; job < jobs; job++)); do
    hiendmae_benchmark run -o "few_labels_$grid" & # each takes what nobody has begun
  done
  wait
  hiendmae_benchmark report -o "few_labels_$grid"
done
