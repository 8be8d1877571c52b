#!/usr/bin/env bash
# SFT -> reward model -> PPO; SFT -> DPO; evaluation.
#   bash run_all.sh         the embedded world: some six minutes on two CPU cores, no network
#   ACTOR=facebook/opt-1.3b DATA=Dahoas/rm-static NUM_GPUS=8 bash run_all.sh      as DeepSpeed-Chat
# Also: CRITIC, OUTPUT, SEED, SPLIT (--data_split), ZERO_STAGE (other models), DTYPE, MASTER_PORT
# (one a run); SFT_FLAGS, RM_FLAGS, DPO_FLAGS, PPO_FLAGS, EVAL_FLAGS join the commands, and win.
set -euo pipefail; cd "$(dirname "$0")"
ACTOR=${ACTOR:-toy} DATA=${DATA:-toy} NUM_GPUS=${NUM_GPUS:-1} ZERO_STAGE=${ZERO_STAGE:-2}
OUTPUT=${OUTPUT:-output} SEED=${SEED:-1234} DTYPE=${DTYPE:-auto}
SFT=$OUTPUT/sft RM=$OUTPUT/rm DPO=$OUTPUT/dpo PPO=$OUTPUT/ppo
if [ "$ACTOR" = toy ]; then
    CRITIC=${CRITIC:-$SFT} SPLIT=${SPLIT:-2,5,3}
    sft="--learning_rate 2e-3 --num_warmup_steps 20 --log_interval 50"
    rm="--learning_rate 3e-4 --num_warmup_steps 20 --num_train_epochs 2 --log_interval 50
        --per_device_train_batch_size 8 --per_device_eval_batch_size 64"
    dpo="--learning_rate 2e-4 --beta 0.1 --max_steps 500 --max_eval_rows 1000 --log_interval 50"
    ppo="--actor_lr 3e-4 --critic_lr 1e-3 --lr_scheduler_type linear --num_warmup_steps 10
         --per_device_generation_batch_size 64 --per_device_training_batch_size 64
         --max_prompt_seq_len 32 --max_answer_seq_len 48"
    evaluation="--best_of 4 16 --max_prompt_seq_len 32 --max_answer_seq_len 48 --batch_size 512"
else
    CRITIC=${CRITIC:-facebook/opt-350m} SPLIT=${SPLIT:-2,4,4}
    sft="--learning_rate 9.65e-6 --num_train_epochs 16 --per_device_train_batch_size 8
         --per_device_eval_batch_size 8 --zero_stage $ZERO_STAGE"
    rm="--weight_decay 0.1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
    dpo="--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --zero_stage $ZERO_STAGE"
    ppo="--per_device_generation_batch_size 4 --per_device_training_batch_size 4
         --actor_zero_stage $ZERO_STAGE --critic_zero_stage $ZERO_STAGE"
    evaluation="--best_of 4 16 --batch_size 32"
fi
command -v nvidia-smi rocm-smi > /dev/null || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}  # quiet
launch="deepspeed --quiet --num_gpus $NUM_GPUS --master_port ${MASTER_PORT:-29500}"
common="--data_path $DATA --data_split $SPLIT --seed $SEED --dtype $DTYPE"
$launch train_sft.py --model_name_or_path "$ACTOR" --output_dir "$SFT" $common $sft ${SFT_FLAGS:-}
$launch train_rm.py --model_name_or_path "$CRITIC" --output_dir "$RM" $common $rm ${RM_FLAGS:-}
$launch train_dpo.py --model_name_or_path "$SFT" --output_dir "$DPO" $common $dpo ${DPO_FLAGS:-}
$launch train_ppo.py --actor_model_name_or_path "$SFT" --critic_model_name_or_path "$RM" \
    --output_dir "$PPO" --enable_ema $common $ppo ${PPO_FLAGS:-}
python -m rlhf.evaluate --models sft="$SFT" dpo="$DPO" ppo="$PPO/actor" ema="$PPO/actor_ema" \
    --reward_model "$RM" --output_dir "$OUTPUT/evaluation" $common $evaluation ${EVAL_FLAGS:-}
