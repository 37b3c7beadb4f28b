"""Fine-tune with `SFTTrainer` of TRL, where only what enough texts agree on is learnt.

    python examples/trl_sft.py
    torchrun --nproc-per-node 2 examples/trl_sft.py

A tiny Llama learns to count upwards from texts of several lengths, a fifth of which have wrong
words in them. The texts of a micro-batch stand in one row, without padding; every one of them
votes, over all micro-batches of a step and over all processes.
"""

import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils import logging
from trl import SFTConfig

import htv
from htv.integrations.trl import HtvSFTTrainer

NUMBERS = 30
SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, the numbers from 0 to 29: nothing is loaded."""
    words = {word: i for i, word in enumerate([*SPECIAL, *map(str, range(NUMBERS))])}
    found = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts(count: int, wrong: float, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in torch.randint(0, NUMBERS, (count,), generator=generator).tolist():
        length = int(torch.randint(4, 8, (), generator=generator))
        words = [(start + i) % NUMBERS for i in range(length)]
        if torch.rand((), generator=generator) < wrong:
            words = torch.randint(0, NUMBERS, (length,), generator=generator).tolist()
        found.append(" ".join(map(str, words)))
    return Dataset.from_dict({"text": found})


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads only get in the way of a tiny model
    logging.set_verbosity_error()
    disable_progress_bars()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUMBERS + len(SPECIAL), hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            padding_free=True,  # or packing=True, which fills rows of max_length tokens
            max_length=None,
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
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
        )
        trainer = HtvSFTTrainer(
            model,
            args=arguments,
            train_dataset=texts(2000, wrong=0.2, seed=0),
            eval_dataset=texts(200, wrong=0.0, seed=1),
            processing_class=tokenizer(),
            rule=htv.AndMask(0.2),
            attach={"stats": True},  # log how far texts agree, beside the loss
        )
        trainer.remove_callback(PrinterCallback)  # logs go to TensorBoard, W&B, ... by report_to
        trainer.train()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        losses = [f"{entry['eval_loss']:.3f}" for entry in history if "eval_loss" in entry]
        print(f"{arguments.world_size * 8 * 4} examples voted per step")
        print(f"loss on clean texts: {', '.join(losses)}")
        name = "htv/model.layers.0.mlp.up_proj.weight"
        for entry in history:
            if f"{name}/kept_fraction" in entry:
                fields = ("kept_fraction", "mean_agreement", "m_coherence", "noise_scale")
                told = ", ".join(f"{field} {entry[f'{name}/{field}']:.3f}" for field in fields)
                print(f"step {entry['step']}, {name}: {told}")


if __name__ == "__main__":
    main()
