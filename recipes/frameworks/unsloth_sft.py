"""Unsloth with selection before each epoch: python unsloth_sft.py"""

from unsloth import FastLanguageModel  # before trl and transformers  # isort: skip
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth_zoo.dataset_utils import train_on_responses_only

from ifd_trainer import IFDSelectionCallback

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"

if __name__ == "__main__":
    model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-3B", max_seq_length=1024)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    rows = load_dataset("yahma/alpaca-cleaned", split="train").filter(lambda row: not row["input"])
    rows = rows.map(lambda row: {"text": PROMPT.format(**row) + row["output"] + tokenizer.eos_token})
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows.select_columns(["text"]),
        args=SFTConfig(output_dir="runs/unsloth", max_length=1024, num_train_epochs=3, learning_rate=2e-4),
    )
    trainer = train_on_responses_only(trainer, instruction_part="### Instruction:\n", response_part="### Response:\n")
    trainer.add_callback(IFDSelectionCallback(trainer, keep=0.10))  # the one line that is added
    trainer.train()
