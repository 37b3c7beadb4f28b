"""Fine-tune with Hugging Face `Trainer`, where only what enough examples agree on is learnt.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py

A tiny GPT-2 learns sequences that count upwards, a fifth of which have wrong tokens in them. All
examples of a step vote, over its micro-batches and over all processes.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainingArguments

import htv
from htv.integrations.huggingface import HtvTrainer

VOCABULARY, LENGTH = 32, 10


def sequences(count: int, wrong: float, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    ids = (starts + torch.arange(LENGTH)) % VOCABULARY
    noise = torch.randint(0, VOCABULARY, ids.shape, generator=generator)
    spoilt = torch.rand(count, generator=generator) < wrong
    ids[spoilt] = noise[spoilt]
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads only get in the way of a tiny model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            max_steps=40,
            max_grad_norm=1.0,
            learning_rate=3e-3,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = HtvTrainer(
            model,
            arguments,
            train_dataset=sequences(2000, wrong=0.2, seed=0),
            eval_dataset=sequences(200, wrong=0.0, seed=1),
            rule=htv.AndMask(0.2),
            attach={"stats": True},  # log how far examples agree, beside the loss
        )
        trainer.remove_callback(PrinterCallback)  # logs go to TensorBoard, W&B, ... by report_to
        trainer.train()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        losses = [f"{entry['eval_loss']:.3f}" for entry in history if "eval_loss" in entry]
        print(f"{arguments.world_size * 8 * 4} examples voted per step")
        print(f"loss on clean sequences: {', '.join(losses)}")
        name = "htv/transformer.h.0.mlp.c_fc.weight"
        for entry in history:
            if f"{name}/kept_fraction" in entry:
                fields = ("kept_fraction", "mean_agreement", "m_coherence", "noise_scale")
                told = ", ".join(f"{field} {entry[f'{name}/{field}']:.3f}" for field in fields)
                print(f"step {entry['step']}, {name}: {told}")


if __name__ == "__main__":
    main()
