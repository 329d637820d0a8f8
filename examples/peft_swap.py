"""MoA where LoRA was: in a TRL script, `peft_config` is the only line that changes.

Fine-tunes the embedded base on one bundled task for a few steps, saves the adapter, loads it again and lets it answer.

    python examples/peft_swap.py [--steps 20] [--output FOLDER]
"""

import argparse
import tempfile

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import moa
from moa.assets import base_path
from moa.tasks import TASKS, generate


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the embedded base with Soft MoA through TRL.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--task", choices=list(TASKS), default=next(iter(TASKS)))
    parser.add_argument("--output", default=None, help="where the adapter goes; default: a temporary folder")
    options = parser.parse_args()
    output = options.output or tempfile.mkdtemp(prefix="moa-peft-swap-")

    rows = generate(options.task, "train", 200)
    data = Dataset.from_list([{"prompt": row["instruction"], "completion": " " + row["output"]} for row in rows])
    trainer = SFTTrainer(
        model=str(base_path()),
        args=SFTConfig(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            model_init_kwargs={"dtype": "float32"},  # bfloat16 is slow on most CPUs
        ),
        train_dataset=data,
        peft_config=moa.preset("soft-moa"),  # was: LoraConfig(r=16, target_modules="all-linear")
    )
    trainer.train()
    trainer.save_model(output)
    trainer.model.print_trainable_parameters()

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path(), dtype="float32"), output)
    question = generate(options.task, "test", 1)[0]
    inputs = tokenizer(question["instruction"], return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"adapter:  {output}")
    print(f"question: {question['instruction']}")
    print(f"answer:   {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    print(f"expected: {question['output']}")


if __name__ == "__main__":
    main()
