# Before each of 3 epochs, the model as it is scores all rows and trains on 10 %: bash swift_sft.sh
swift sft \
  --external_plugins swift_plugin.py \
  --callbacks ifd \
  --model Qwen/Qwen2.5-1.5B-Instruct \
  --dataset AI-ModelScope/alpaca-gpt4-data-en \
  --output_dir alpaca-swift \
  --tuner_type lora \
  --max_length 512 \
  --group_by_length true \
  --per_device_train_batch_size 8 \
  --gradient_accumulation_steps 16 \
  --num_train_epochs 3 \
  --learning_rate 1e-4 \
  --warmup_ratio 0.03 \
  --split_dataset_ratio 0.01 \
  --eval_strategy epoch
