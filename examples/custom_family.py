"""A model family that is not in MoA's table: say where its parts are, in the configuration.

Builds a tiny random Phi model (nothing is downloaded), shows the error without `architecture=`, then trains and reloads
an adapter with it. The paths are relative to one decoder block; `print(model)` shows them.

    python examples/custom_family.py
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

import moa

PHI = {
    "blocks": "layers",
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.dense",
    "gate": None,  # Phi's MLP has two layers and no gate projection
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "mlp": "mlp",
}


def tiny_phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return PhiForCausalLM(PhiConfig(**sizes, **tokens)).eval()


def main() -> None:
    try:
        get_peft_model(tiny_phi(), moa.preset("soft-moa"))
    except ValueError as error:
        print(f"without architecture=: {error}\n")

    ids = torch.randint(3, 64, (4, 12))
    model = get_peft_model(tiny_phi(), moa.preset("soft-moa", architecture=PHI))
    with torch.no_grad():
        print("identical to the base before training:", torch.equal(model(ids).logits, tiny_phi()(ids).logits))

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
        loaded = PeftModel.from_pretrained(tiny_phi(), folder)
        print("the same after saving and loading:", torch.equal(loaded(ids).logits, trained))


if __name__ == "__main__":
    main()
