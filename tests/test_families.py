"""The default mixture on every family that `DECODERS` has: what it hosts, and that it keeps what it promises."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from families import DECODERS, REFUSED, VOCABULARY, Decoder, build_decoder
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING

import moa

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


SLOW = ("kimi_linear",)


def known(names: Any) -> list[Any]:
    """The families of this release of transformers."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names if name in CONFIG_MAPPING
    ]


@pytest.fixture(params=known(DECODERS), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def decoder(name: str) -> Decoder:
    return DECODERS[name]


@pytest.fixture(scope="module")
def base(name: str, decoder: Decoder) -> Any:
    return build_decoder(name, decoder.settings)


@pytest.fixture(scope="module")
def model(name: str, decoder: Decoder) -> PeftModel:
    """The family with the default mixture, as it starts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot host all of this configuration's default experts")
        config = moa.preset("soft-moa", r=2, size=4, length=3, **decoder.overrides)
        return get_peft_model(build_decoder(name, decoder.settings), config).eval()


@pytest.fixture(scope="module")
def acting(model: PeftModel) -> PeftModel:
    """The same model from here on, with every adapter weight drawn at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moa_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Positions that start at the first real token, for families that take them."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def logits(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, **positions(model, mask)).logits


def test_starts_as_the_base_model_bit_for_bit(base: Any, model: PeftModel, tokens: Tensor) -> None:
    assert torch.equal(logits(model, tokens), logits(base, tokens))


def test_hosts_what_the_table_says(decoder: Decoder, acting: PeftModel, base: Any, tokens: Tensor) -> None:
    with moa.gate_values(acting) as record:
        assert not torch.allclose(logits(acting, tokens), logits(base, tokens), atol=1e-3)
    blocks = base.config.get_text_config().num_hidden_layers
    assert [record.columns.get(index, []) for index in range(blocks)] == [decoder.columns(i) for i in range(blocks)]


def test_every_trainable_tensor_gets_a_gradient(acting: PeftModel, tokens: Tensor) -> None:
    acting.train()
    acting(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False).loss.backward()
    acting.eval()
    for name, parameter in acting.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.abs().max() > 0, f"{name} has a gradient of zeros"
    acting.zero_grad()


def test_no_token_moves_an_earlier_logit(acting: PeftModel, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 7 - 3) % (VOCABULARY - 3) + 3
    before, after = logits(acting, tokens), logits(acting, changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=2e-6)
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-3)


def test_left_padding_changes_nothing(base: Any, acting: PeftModel, tokens: Tensor) -> None:
    if not torch.allclose(*with_padding_and_alone(base, tokens), **TOLERANCE):
        pytest.skip("padding changes the base model itself")
    torch.testing.assert_close(*with_padding_and_alone(acting, tokens), **TOLERANCE)


def with_padding_and_alone(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a text on the left of which there is padding, and of the same text alone."""
    mask, padded = torch.ones_like(tokens), tokens.clone()
    mask[0, :3], padded[0, :3], padded[0, 3:] = 0, 0, tokens[0, :6]
    return logits(model, padded, mask)[0, 3:], logits(model, tokens[:1, :6])[0]


def test_loads_what_it_saved_without_a_word(
    name: str, decoder: Decoder, acting: PeftModel, tokens: Tensor, tmp_path: Any
) -> None:
    acting.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_decoder(name, decoder.settings), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(acting, tokens))
    assert loaded.peft_config["default"].experts == acting.peft_config["default"].experts


def test_cached_decoding_is_a_full_forward(base: Any, acting: PeftModel, tokens: Tensor) -> None:
    if not hasattr(base(input_ids=tokens, attention_mask=torch.ones_like(tokens)), "past_key_values"):
        pytest.skip("the base model has no cache")
    if not torch.allclose(*by_steps_and_at_once(base, tokens), rtol=1e-5, atol=1e-5):  # adapters enlarge what is there
        pytest.skip("the base model's own cached decoding differs from its full forward")
    torch.testing.assert_close(*by_steps_and_at_once(acting, tokens), **TOLERANCE)


def by_steps_and_at_once(
    model: Any, tokens: Tensor, mask: Tensor | None = None, cuts: tuple[int, ...] = (0, 5, 6, 7, 8, 9)
) -> tuple[Tensor, Tensor]:
    """Logits of several forwards on one cache, and of a single one."""
    mask = torch.ones_like(tokens) if mask is None else mask
    place, past, steps = positions(model, mask), None, []
    for start, stop in itertools.pairwise(cuts):
        now = {key: value[:, start:stop] for key, value in place.items()}
        with torch.no_grad():
            out = model(
                input_ids=tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=past,
                use_cache=True,
                **now,
            )
        past = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, dim=1), logits(model, tokens, mask)


def with_preset(family: str, preset: str, **settings: Any) -> PeftModel:
    """A family with another preset, every adapter weight drawn at random."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot host all of this configuration's default experts")
        config = moa.preset(preset, r=2, **settings)
        model = get_peft_model(build_decoder(family, DECODERS[family].settings), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moa_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


ODD = ("bamba", "jamba", "nemotron_h", "qwen3_next", "recurrent_gemma", "openai-gpt")


@pytest.mark.parametrize("family", known(ODD))
def test_one_decision_for_the_text_so_far_in_odd_families(family: str, tokens: Tensor) -> None:
    """Blocks whose part of the cache does not count tokens, and a mask that is the same for all queries."""
    model = with_preset(family, "instance-moa")
    if family != "recurrent_gemma":  # whose own padding leaks
        torch.testing.assert_close(*with_padding_and_alone(model, tokens), **TOLERANCE)
    if family not in ("openai-gpt", "recurrent_gemma", "nemotron_h"):  # no cache, or one that is not exact by itself
        torch.testing.assert_close(*by_steps_and_at_once(model, tokens), **TOLERANCE)


@pytest.mark.parametrize("stage", ["block", "attention"])
@pytest.mark.parametrize("family", known(["lfm2", "bamba", "olmo_hybrid", "bailing_hybrid", "gemma2"]))
def test_several_tokens_at_once_go_on_with_one_decision(family: str, stage: str) -> None:
    """Also in blocks that keep states instead of keys, which call the cache and the mask otherwise."""
    model = with_preset(family, "instance-moa", router={"input": stage})
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for given in (torch.ones_like(tokens), mask):
        found, expected = by_steps_and_at_once(model, tokens, given, cuts=(0, 5, 6, 10, 12))
        torch.testing.assert_close(found[given.bool()], expected[given.bool()], **TOLERANCE)


@pytest.mark.parametrize("family", known(["falcon_h1", "lfm2", "gemma2"]))
def test_a_static_cache_of_unlike_layers_keeps_one_decision(family: str, tokens: Tensor) -> None:
    """Whose masks are made after the first layer of full attention, which what routers remember is not."""
    model = with_preset(family, "instance-moa")
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(input_ids=tokens, cache_implementation="static", **settings), expected)


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="not in this release of transformers")
def test_one_decision_where_blocks_are_run_on_the_last_tokens_alone_is_refused() -> None:
    """As Gemma 4's are that take keys from earlier ones: a text's mean would be that of its last token."""
    types = ["sliding_attention", "full_attention"] * 2
    settings = {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": types}
    config = moa.MoAConfig(experts=[moa.LoraExpert(["q", "o"])], router=moa.Router(level="instance"))
    with pytest.raises(ValueError, match=r"block 3 of gemma4_text .*layers_to_transform=\[0, 1, 2\]"):
        get_peft_model(build_decoder("gemma4_text", settings), config)
    config.layers_to_transform = [0, 1, 2]
    get_peft_model(build_decoder("gemma4_text", settings), config)


@pytest.mark.skipif("minimax" not in CONFIG_MAPPING, reason="not in this release of transformers")
def test_a_cache_with_layers_of_its_own_is_refused_at_instance_level(tokens: Tensor) -> None:
    model = with_preset("minimax", "instance-moa")
    with pytest.raises(ValueError, match="cannot keep its state on a MiniMaxCache"):
        logits(model, tokens)
    model(input_ids=tokens, use_cache=False)


@pytest.mark.parametrize("family", known(["minicpm3", "deepseek_v3", "bailing_hybrid"]))
def test_compressed_projections_learn_without_a_router(family: str, tokens: Tensor) -> None:
    model = with_preset(family, "molora").train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_router_on_several_residual_streams_is_refused_by_name() -> None:
    model = build_decoder("deepseek_v4", {})
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="deepseek_v4 read several residual streams"):
        get_peft_model(model, moa.preset("paper-soft-moa"))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("family", known(REFUSED))
def test_is_refused_by_name_and_reason_before_it_is_touched(family: str) -> None:
    words, settings = REFUSED[family]
    model = build_decoder(family, settings)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words) as error:
        get_peft_model(model, moa.preset("soft-moa"))
    assert family in str(error.value)
    assert [name for name, _ in model.named_modules()] == names
