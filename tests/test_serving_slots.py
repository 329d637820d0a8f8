"""Which mixture is in which slot of an engine, and what may be loaded while it runs; without an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import perturb, tiny_config, tiny_llama
from torch import Tensor

import moa
from moa.serving.adapters import configuration, fingerprint
from moa.serving.slots import Slots

BASE = "a-base"


class Asked(NamedTuple):
    lora_int_id: int
    lora_name: str
    lora_path: str


class Engine:
    """Keeps what its slots were filled with, as sums that tell mixtures apart."""

    def __init__(self, configs: list[moa.MoAConfig], *, caching: bool = True):
        self.inside: dict[int, float] = {}
        self.fills = 0
        self.slots = Slots([fingerprint([c]) for c in configs], self.fill, {BASE}, caching=caching)

    def fill(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        self.inside[slot] = sum_of(tensors)
        self.fills += 1

    def answers(self, *asked: Asked) -> list[float]:
        """What a batch with these requests computes with."""
        used = self.slots.use(asked)
        return [self.inside[used[one.lora_int_id]] for one in asked]


def sum_of(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.abs().sum()) for tensor in tensors.values())


def weights_of(asked: Asked) -> float:
    return sum_of(load_file(Path(asked.lora_path, "adapter_model.safetensors")))


@pytest.fixture
def saved(tmp_path):
    """Saves a mixture with random weights and gives the request for it."""

    def save(number: int, name: str, folder: str | None = None, base: str = BASE, **fields: Any) -> Asked:
        model = perturb(get_peft_model(tiny_llama(), tiny_config(**fields)), seed=len(list(tmp_path.iterdir())))
        path = tmp_path / (folder or name)
        model.save_pretrained(path)
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        return Asked(number, name, str(path))

    return save


def test_mixtures_come_while_it_runs_and_take_turns(saved):
    asked = [saved(number, f"m{number}") for number in (1, 2, 3)]
    engine = Engine([configuration(asked[0].lora_path)] * 2)
    for one in asked:
        assert engine.slots.add(one)
    assert engine.slots.numbers == {1, 2, 3}
    for pair in ([0, 1], [2], [0, 2], [1, 2], [1, 0], [0], [2, 1]):
        batch = [asked[place] for place in pair]
        assert engine.answers(*batch) == [weights_of(one) for one in batch]


def test_one_that_is_used_stays_where_it_is(saved):
    asked = [saved(number, f"m{number}") for number in (1, 2, 3)]
    engine = Engine([configuration(asked[0].lora_path)] * 2)
    engine.answers(asked[0], asked[1])
    engine.answers(asked[0])
    engine.answers(asked[2])  # takes the place of the second, which was used longest ago
    before = engine.fills
    engine.answers(asked[0], asked[2])
    assert engine.fills == before


def test_processes_agree_on_what_is_in_a_slot(saved):
    """vLLM hands every process a set of requests, whose order is another one in each."""
    asked = [saved(number, f"m{number}") for number in (1, 2, 3)]
    engines = [Engine([configuration(asked[0].lora_path)] * 2) for _ in range(2)]
    for batch in ([asked[1], asked[0]], [asked[0], asked[1]], [asked[2]], [asked[2], asked[0]], [asked[1]]):
        engines[0].answers(*batch)
        engines[1].answers(*reversed(batch))
        assert engines[0].inside == engines[1].inside


def test_a_batch_with_more_than_there_are_slots_is_refused(saved):
    asked = [saved(number, f"m{number}") for number in (1, 2)]
    engine = Engine([configuration(asked[0].lora_path)])
    with pytest.raises(ValueError, match="more than 1 mixtures"):
        engine.answers(*asked)


def test_new_weights_in_place(saved):
    old, new = saved(1, "m", "first"), saved(1, "m", "second")
    engine = Engine([configuration(old.lora_path)])
    engine.slots.add(old)
    assert not engine.slots.add(new)
    assert engine.slots.add(new, again=True)
    assert engine.answers(new) == [weights_of(new)]
    assert engine.answers(old) == [weights_of(new)]  # in flight when the new weights came


def test_what_a_request_names_is_loaded_even_if_nobody_loaded_it(saved):
    """As in `vllm.LLM.generate`, which is given requests and told nothing before."""
    old, new = saved(1, "m", "first"), saved(1, "m", "second")
    engine = Engine([configuration(old.lora_path)])
    assert engine.answers(old) == [weights_of(old)]
    assert engine.answers(new) == [weights_of(new)]


@pytest.mark.parametrize("caching", [True, False])
def test_a_name_and_a_folder_never_stand_for_two_sets_of_weights(saved, caching):
    """Under the two the prefix cache files what was computed."""
    asked = saved(1, "m")
    engine = Engine([configuration(asked.lora_path)], caching=caching)
    engine.slots.add(asked)
    assert engine.slots.add(asked, again=True)  # the same once more
    file = Path(asked.lora_path, "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    if not caching:
        assert engine.slots.add(asked, again=True)
        assert engine.answers(asked) == [weights_of(asked)]
        return
    with pytest.raises(ValueError, match=r"had other weights from .*: save new weights in a new folder"):
        engine.slots.add(asked, again=True)
    engine.slots.remove(1)
    with pytest.raises(ValueError, match="--no-enable-prefix-caching"):
        engine.slots.add(asked._replace(lora_int_id=2))
    assert engine.slots.add(asked._replace(lora_int_id=3, lora_name="another"))


def test_weights_that_were_replaced_do_not_come_back_under_their_folder(saved):
    """Requests in flight went on with the new ones, and what they computed is filed under the old folder."""
    old, new = saved(1, "m", "first"), saved(1, "m", "second")
    engine = Engine([configuration(old.lora_path)])
    engine.slots.add(old)
    engine.slots.add(new, again=True)
    with pytest.raises(ValueError, match="or got others since"):
        engine.slots.add(old, again=True)


def test_other_configurations_have_slots_of_their_own(saved):
    one, other = saved(1, "one"), saved(2, "other", gating=moa.TopK(k=2))
    third = saved(3, "third", experts=[moa.LoraExpert(targets=["q"], r=3)])
    engine = Engine([configuration(one.lora_path), configuration(other.lora_path)])
    assert engine.answers(other, one) == [weights_of(other), weights_of(one)]
    with pytest.raises(ValueError, match="has other experts, another router or another gating"):
        engine.slots.add(third)
    with pytest.raises(ValueError, match="has other experts"):
        engine.slots.add(other._replace(lora_int_id=1, lora_name="one"), again=True)


def test_another_base_is_refused(saved):
    one, other = saved(1, "one"), saved(2, "other", base="b-base")
    engine = Engine([configuration(one.lora_path)] * 2)
    with pytest.raises(ValueError, match="was trained on 'b-base', this engine's mixtures on 'a-base'"):
        engine.slots.add(other)


def test_a_number_of_another_mixture_is_refused(saved):
    one, other = saved(1, "one"), saved(1, "other")
    engine = Engine([configuration(one.lora_path)])
    engine.slots.add(one)
    with pytest.raises(ValueError, match="'other' has the number 1, which is that of 'one'"):
        engine.answers(other)


def test_what_is_not_there_is_named(saved, tmp_path):
    engine = Engine([configuration(saved(1, "one").lora_path)])
    with pytest.raises(FileNotFoundError, match="no adapter"):
        engine.slots.add(Asked(2, "two", str(tmp_path / "nothing")))


def test_weights_that_do_not_fit_leave_everything_as_it_was(saved):
    one, other = saved(1, "one"), saved(2, "other")
    engine = Engine([configuration(one.lora_path)])

    def fill(slot: int, tensors: Mapping[str, Tensor]) -> None:
        if sum_of(tensors) == weights_of(other):
            raise ValueError("has shape")
        engine.fill(slot, tensors)

    slots = Slots([fingerprint([configuration(one.lora_path)])], fill, {BASE}, caching=True)
    slots.add(one)
    with pytest.raises(ValueError, match="has shape"):
        slots.add(other)
    assert slots.numbers == {1}
    assert slots.use([one]) == {1: 0}


def test_the_version_of_peft_that_wrote_a_mixture_does_not_matter(saved):
    one, other = saved(1, "one"), saved(2, "other")
    file = Path(other.lora_path, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inference_mode": True, "revision": "x"}))
    engine = Engine([configuration(one.lora_path)])
    assert engine.slots.add(other)


def test_the_warm_up_of_an_engine(saved):
    one = saved(1, "one")
    engine = Engine([configuration(one.lora_path)] * 2)
    asked = [Asked(number, f"warmup_{number}", "/nowhere") for number in (1, 2)]
    for request in asked:
        engine.slots.pretend(request)
    assert engine.slots.use(asked) == {1: 0, 2: 1}
    engine.slots.clear()
    assert engine.answers(one) == [weights_of(one)]
