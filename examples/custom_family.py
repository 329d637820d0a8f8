"""A model family that MoA has never seen: most of it is found, the rest is said in the configuration.

Builds a tiny random model of a family of its own whose queries, keys and values come out of one matrix (nothing is
downloaded). Its modules are found by their names and shapes, but not the order inside that matrix: shows the error that
asks for it, answers with `architecture=`, then trains and reloads an adapter.

    python examples/custom_family.py
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import moa


class MyConfig(GPTNeoXConfig):
    """A family of its own, as far as MoA can tell."""

    model_type = "my_family"


class MyForCausalLM(GPTNeoXForCausalLM):
    """Its model."""

    config_class = MyConfig


def tiny_model() -> MyForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return MyForCausalLM(MyConfig(**sizes, **tokens)).eval()


def main() -> None:
    try:
        get_peft_model(tiny_model(), moa.preset("soft-moa"))
    except ValueError as error:
        print(f"without architecture=: {error}\n")

    ids = torch.randint(3, 64, (4, 12))
    # One head's query, key and value stand together, then the next head's. Everything else is found.
    model = get_peft_model(tiny_model(), moa.preset("soft-moa", architecture={"qkv_layout": "per_head"}))
    with torch.no_grad():
        print("identical to the base before training:", torch.equal(model(ids).logits, tiny_model()(ids).logits))

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    with moa.gate_values(model) as record, torch.no_grad():
        trained = model(ids).logits
    for name, gate in zip(record.experts, record.gates[0].mean(dim=(0, 1)), strict=True):
        print(f"mean gate of {name} in block 0: {gate:.3f}")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_model(), folder)
        print("the same after saving and loading:", torch.equal(loaded(ids).logits, trained))


if __name__ == "__main__":
    main()
