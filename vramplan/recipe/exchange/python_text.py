"""The parts of exported scripts that are the same in each."""

from __future__ import annotations

ARGUMENTS = '''
def training_arguments(output_dir, **more):
    """The arguments of this run; `more` goes to TrainingArguments too."""
    return TrainingArguments(output_dir=output_dir, **{"report_to": "none", **SETTINGS, **more})
'''

PACKED = '''
def load_data(tokenizer, data=DATA):
    """The column "text" of a JSONL file, packed into sequences of SEQ_LEN tokens."""
    rows = load_dataset("json", data_files=data, split="train")

    def packed(batch):
        ids = [i for text in batch["text"] for i in [*tokenizer(text)["input_ids"], end]]
        cuts = range(0, len(ids) - len(ids) % SEQ_LEN, SEQ_LEN)
        sequences = [ids[cut : cut + SEQ_LEN] for cut in cuts]
        return {"input_ids": sequences, "labels": sequences}

    end = tokenizer.eos_token_id
    return rows.map(packed, batched=True, remove_columns=rows.column_names)
'''

MAIN = '''
def main(**more):
    """Trains; `more` goes to TrainingArguments."""
    arguments = training_arguments(**{{"output_dir": {output}, **more}})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = load_model(arguments)
    trainer = Trainer(model=model, args=arguments, train_dataset=load_data(tokenizer))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
'''

SFT_CONFIG = '''
def sft_config(output_dir, **more):
    """The arguments of this run; `more` goes to SFTConfig too."""
    return SFTConfig(output_dir=output_dir, **{"report_to": "none", **SETTINGS, **more})
'''

SFT_MAIN = '''
def main(**more):
    """Trains; `more` goes to SFTConfig."""
    trainer = SFTTrainer(
        model=MODEL,
        args=sft_config(**{{"output_dir": {output}, **more}}),
        train_dataset=load_dataset("json", data_files=DATA, split="train"),
        peft_config={adapters},
        quantization_config={quantization},
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
'''
