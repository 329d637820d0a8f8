"""Attention influence: the official numbers, an independent derivation in every family, resuming, and bad input."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build_family
from safetensors.torch import load_file
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from moa.spans.evidence import probe
from moa.spans.evidence.influence import Influence, influence
from moa.spans.evidence.items import Item, log_odds, response_loss
from moa.spans.evidence.probe import BlockSums, probing

GOLDEN = Path(__file__).parents[1] / "golden" / "spans"
ON_INTERFACE = [name for name in FAMILIES if name not in ("falcon", "gptj", "bloom", "mpt")]


def item(length: int = 24, start: int = 12, seed: int = 0, vocabulary: int = 97) -> Item:
    """Random tokens, the last of which are the response."""
    ids = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Item(tuple(ids), tuple(place >= start for place in range(length)))


@pytest.fixture(scope="module")
def official() -> tuple[LlamaForCausalLM, Item, dict[str, torch.Tensor]]:
    config = json.loads((GOLDEN / "profile.json").read_text())["config"]
    tensors = load_file(GOLDEN / "profile.safetensors")
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope)).float().eval()
    model.load_state_dict({name[7:]: tensor for name, tensor in tensors.items() if name.startswith("weight.")})
    marks = tuple(map(bool, tensors["response_mask"][0].tolist()))
    return model, Item(tuple(tensors["input_ids"][0].tolist()), marks), tensors


@pytest.mark.parametrize("rows", [50, 512])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_official_influence(official, block, rows, monkeypatch):
    monkeypatch.setattr(probe, "ROWS", rows)
    model, text, tensors = official
    found = influence(model, [text], 128, block, loss="cross-entropy")
    signed = tensors[f"effect_block{block}_signed"][0]
    # One entry per block: its absolute value is that of the signed one.
    absolute = signed.abs() if block == 1 else tensors[f"effect_block{block}_abs"][0]
    assert found.loss == pytest.approx(tensors["loss"].item(), abs=2e-6)
    torch.testing.assert_close(found.mean("signed"), signed, atol=2e-7 * block, rtol=1e-5)
    torch.testing.assert_close(found.mean("absolute"), absolute, atol=2e-7 * block, rtol=1e-5)
    torch.testing.assert_close(found.mean(), signed.abs(), atol=2e-7 * block, rtol=1e-5)


def by_score_gradients(model: Any, text: Item) -> torch.Tensor:
    """(layers, KV heads, N, N) influence from the gradient of a bias on every score, in the family's own eager code.

    dL/dscore = A (g - sum g A), which is what a removal costs but for the factor -1 / (1 - A).
    """
    biases: dict[int, torch.Tensor] = {}
    weights: dict[int, torch.Tensor] = {}

    def biased(module, query, key, value, mask, **options):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        bias = torch.zeros(1, query.shape[1], query.shape[2], key.shape[2], dtype=query.dtype, requires_grad=True)
        biases[module.layer_idx] = bias
        output, found = eager(module, query, key, value, mask + bias, **options)
        weights[module.layer_idx] = found.detach()
        return output, found

    AttentionInterface.register("test-bias", biased)
    AttentionMaskInterface.register("test-bias", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test-bias")
    response_loss(model, text).backward()
    model.set_attn_implementation(before)
    layers = []
    for layer in sorted(biases):
        each = -biases[layer].grad[0] / (1 - weights[layer][0]).clamp(min=1e-7)
        config = model.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        layers.append(each.unflatten(0, (kv_heads, -1)).sum(1))
    return torch.stack(layers)


@pytest.mark.parametrize("family", ON_INTERFACE)
def test_every_family_without_code_for_it(family, monkeypatch):
    monkeypatch.setattr(probe, "ROWS", 7)  # of 24, so that some rows come after others
    # torch has no grouped matrix product of experts in float64.
    model = build_family(family, dtype=torch.float32 if FAMILIES[family].down is False else torch.float64)
    if FAMILIES[family].settings.get("sliding_window"):
        model.config.sliding_window = 8
    text = item()
    wanted = by_score_gradients(model, text)
    found = influence(model, [text], len(text.tokens), block=1, loss="cross-entropy").mean("signed")
    # The first row has one entry and nothing to renormalise onto: by definition not what the gradient says.
    torch.testing.assert_close(found[:, :, 1:], wanted[:, :, 1:].float(), atol=2e-5, rtol=2e-4)


def test_memory_is_that_of_a_block(tiny_llama):
    """What a text keeps for the way back, in bytes: one input for every block more."""
    kept = []
    for layers in (2, 6):
        model, text, sizes = tiny_llama(num_hidden_layers=layers).eval(), item(61, 57, vocabulary=259), []
        before = dict(vars(model.model.layers[0]))

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, probing(model, BlockSums(layers, 2, 64, 8)), torch.enable_grad():
            loss = response_loss(model, text)
        kept.append(sum(sizes))
        assert loss.requires_grad
        assert not [t for t in gc.get_objects() if torch.is_tensor(t) and t.shape[-2:] == (61, 61)]  # masks neither
        assert vars(model.model.layers[0]) == before
    assert kept[1] - kept[0] <= 4 * 64 * model.config.hidden_size * 4 * 2


def test_log_odds_count_certain_answers_like_others(tiny_llama):
    generator = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(5, 7, generator=generator), torch.tensor([0, 1, 2, 3, 3])
    chance = logits.softmax(-1).gather(1, wanted[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, wanted), ((1 - chance) / chance).log().mean())
    # One supervised token: its influence is that on the cross-entropy over the chance of being wrong.
    model, text = tiny_llama().eval(), item(32, 31, vocabulary=259)
    by_loss, by_odds = (influence(model, [text], 32, 8, loss=name) for name in ("cross-entropy", "log-odds"))
    wrong = 1 - torch.tensor(by_loss.loss).neg().exp()
    torch.testing.assert_close(by_odds.signed * wrong, by_loss.signed, atol=1e-7, rtol=1e-4)
    assert by_odds.loss == by_loss.loss
    with pytest.raises(ValueError, match=r"loss='hinge' is not one of \['log-odds', 'cross-entropy'\]"):
        influence(model, [text], 32, 8, loss="hinge")


def test_blocks_of_a_short_text_fill_the_corner(tiny_llama):
    model = tiny_llama().eval()
    text = item(40, 30, vocabulary=259)
    fine = influence(model, [text], 64, 1).mean("absolute")
    coarse = influence(model, [text], 64, 16).mean("absolute")
    torch.testing.assert_close(coarse, fine.unflatten(2, (4, 16)).unflatten(4, (4, 16)).sum((3, 5)))
    assert coarse[..., 3, :].abs().sum() == 0
    assert torch.equal(coarse, coarse.tril())


def test_model_is_left_as_it_was(tiny_llama):
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    influence(model, [item(vocabulary=259)], 32, 8)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    model.set_attn_implementation("moa-influence")
    with pytest.raises(ValueError, match="one whole text"):
        model(torch.ones(1, 4, dtype=torch.long))


class Killed(Exception):
    pass


def test_killed_run_goes_on_to_the_same_numbers(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    items = [item(seed=seed, vocabulary=259) for seed in range(4)]
    whole = influence(model, items, 32, 8)
    seen: list[int] = []

    def kill(done: int) -> None:
        seen.append(done)
        if done == 2 and seen.count(2) == 1:
            raise Killed

    file = tmp_path / "influence.safetensors"
    with pytest.raises(Killed):
        influence(model, items, 32, 8, save_to=file, progress=kill)
    assert Influence.load(file).items == 2
    resumed = influence(model, items, 32, 8, save_to=file, progress=kill)
    assert seen == [0, 1, 2, 2, 3, 4]
    assert torch.equal(resumed.signed, whole.signed)
    assert torch.equal(resumed.absolute, whole.absolute)
    assert (resumed.items, resumed.loss) == (4, whole.loss)
    with pytest.raises(ValueError, match="another model, data set"):
        influence(model, items[:3], 32, 8, save_to=file)
    with pytest.raises(ValueError, match="another model"):  # one of the same name, trained further
        influence(tiny_llama(seed=1).eval(), items, 32, 8, save_to=file)


def test_items_measured_elsewhere_add_up_to_the_same_numbers(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    items = [item(seed=seed, vocabulary=259) for seed in range(4)]
    whole = influence(model, items, 32, 8)
    asked: list[range] = []

    def elsewhere(places: range) -> dict[int, Path]:
        asked.append(places)
        files = {place: tmp_path / f"{place}.safetensors" for place in places}
        for place, path in files.items():
            influence(model, [items[place]], 32, 8, save_to=path)
        return files

    file = tmp_path / "influence.safetensors"

    def kill(done: int) -> None:
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        influence(model, items, 32, 8, save_to=file, progress=kill)
    found = influence(model, items, 32, 8, save_to=file, elsewhere=elsewhere)
    assert asked == [range(1, 4)]
    assert torch.equal(found.signed, whole.signed)
    assert torch.equal(found.absolute, whole.absolute)
    assert (found.items, found.loss) == (4, whole.loss)
    file.unlink()
    with pytest.raises(ValueError, match="another model, data set"):  # files that took one another's names
        influence(model, items, 32, 8, save_to=file, elsewhere=lambda places: {0: tmp_path / "1.safetensors"})


def test_bad_input(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    text = item(vocabulary=259)
    with pytest.raises(ValueError, match="no items"):
        influence(model, [], 32, 8)
    with pytest.raises(ValueError, match="24 tokens, more than length 16"):
        influence(model, [text], 16, 8)
    with pytest.raises(ValueError, match="block=0"):
        influence(model, [text], 32, 0)
    with pytest.raises(ValueError, match="no response token"):
        Item((1, 2), (True, False))
    with pytest.raises(ValueError, match="'both' is not one of"):
        influence(model, [text], 32, 8).mean("both")
    with pytest.raises(FileNotFoundError, match="moa spans profile"):
        Influence.load(tmp_path / "none.safetensors")
    file = tmp_path / "influence.safetensors"
    influence(model, [text], 32, 8, save_to=file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        Influence.load(file)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="item 0 has a loss of nan"):
        influence(model, [text], 32, 8)


def test_items_round_trip_and_refuse_damage():
    text = Item((5, 6, 7, 8, 9), (False, True, True, False, True))
    assert text.to_dict()["response"] == [[1, 3], [4, 5]]
    assert Item.from_dict(json.loads(json.dumps(text.to_dict()))) == text
    for damage in ({"tokens": [1, "x"]}, {"response": [[3, 9]]}, {"response": "all"}, {"tokens": [True] * 5}):
        with pytest.raises(ValueError, match="item's"):
            Item.from_dict(text.to_dict() | damage)
