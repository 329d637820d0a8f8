"""What `moa serve` starts and what it refuses, without an engine."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from jinja2 import Environment
from peft import get_peft_model
from tiny import tiny_config, tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import moa
import moa_autoload
from moa.cli import app
from moa.data import prompt_text
from moa.data.templates import TEMPLATES, prompt_of
from moa.data.tokens import prompt_tokens
from moa.serving.adapters import configuration, fingerprint
from moa.serving.command import chat_template, plan
from moa.serving.releases import check_release
from moa.spans import SpanPlan


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved(base: Path, folder: Path, **fields: object) -> Path:
    """An adapter on ``base`` in ``folder``."""
    model = get_peft_model(tiny_llama(), tiny_config(**fields))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return saved(base, tmp_path / "mine")


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command(base, adapter):
    server = plan([str(adapter)], ["--port", "8001"])
    assert server.command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert option(server.command, "--model") == str(base)
    assert option(server.command, "--served-model-name") == "mine"
    overrides = json.loads(option(server.command, "--hf-overrides"))
    assert overrides == {"architectures": ["MoAForCausalLM"], "moa_adapters": {"mine": str(adapter)}}
    assert server.command[-2:] == ["--port", "8001"]


def test_a_name_of_ones_own(adapter):
    server = plan([f"better={adapter}"], [])
    assert option(server.command, "--served-model-name") == "better"
    assert server.adapters == {"better": str(adapter)}


@pytest.mark.parametrize("rest", [["--spans", "plan.json"], ["--spans=plan.json"]])
def test_span_plans_are_refused(adapter, rest):
    for served in (str(adapter), "a-base-alone"):
        with pytest.raises(ValueError, match="--spans: a plan keeps the first tokens"):
            plan([served], rest)


def test_several_adapters_are_chosen_by_the_name_of_the_model(base, adapter, tmp_path):
    other = saved(base, tmp_path / "other", gating=moa.Soft())
    command = plan([str(adapter), f"second={other}"], ["--port", "1"]).command
    assert option(command, "--served-model-name") == str(base)
    assert json.loads(option(command, "--hf-overrides"))["moa_adapters"] == {"mine": str(adapter), "second": str(other)}
    modules = command.index("--lora-modules")
    assert command[modules + 1 :] == [f"mine={adapter}", f"second={other}", "--port", "1"]
    assert option(command, "--worker-cls") == "moa.serving.vllm_worker.MoAWorker"
    assert option(command, "--max-loras") == "2"
    with pytest.raises(ValueError, match="--worker-cls is set by moa serve"):
        plan([str(adapter), str(other)], ["--worker-cls", "mine"])


def test_slots_for_mixtures_that_come_later(base, adapter):
    command = plan([str(adapter)], ["--max-loras", "4"]).command
    assert option(command, "--served-model-name") == str(base)
    assert option(command, "--lora-modules") == f"mine={adapter}"
    assert command.count("--max-loras") == 1
    assert "--enable-lora" in command


def test_two_adapters_of_one_name_are_refused(adapter):
    with pytest.raises(ValueError, match="two adapters are called 'mine'"):
        plan([str(adapter), str(adapter)], [])


def test_adapters_of_two_bases_are_refused(base, adapter, tmp_path):
    other = saved(base, tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "embedded"}))
    with pytest.raises(ValueError, match="different base models"):
        plan([str(adapter), str(other)], [])


def test_the_user_has_the_last_word(adapter):
    server = plan([str(adapter)], ["--served-model-name=other"])
    assert "--served-model-name" not in server.command


def test_a_base_without_a_chat_template_takes_one_from_the_user(base, adapter):
    file = base / "chat_template.jinja"
    content = file.read_text()
    file.unlink()
    try:
        with pytest.raises(ValueError, match="Give one with vLLM's --chat-template FILE"):
            plan([str(adapter)], [])
        command = plan([str(adapter)], ["--chat-template", "mine.jinja"]).command
    finally:
        file.write_text(content)
    assert option(command, "--chat-template") == "mine.jinja"


@pytest.mark.parametrize("option", ["--model", "--hf-overrides={}", "--hf_overrides", "--model-impl"])
def test_what_makes_it_a_mixture_cannot_be_overruled(adapter, option):
    with pytest.raises(ValueError, match="is set by moa serve"):
        plan([str(adapter)], [option])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": {"level": "instance"}}, "router of level 'instance'"),
        ({"router": {"level": "reference-instance"}}, "router of level 'reference-instance'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(base, adapter, fields, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        plan([str(adapter)], [])


def test_an_adapter_that_was_trained_under_a_span_plan_is_refused(adapter):
    SpanPlan.dense(2, 2).save(adapter / "spans.json")
    with pytest.raises(ValueError, match="trained under a span plan"):
        configuration(adapter)


def test_another_method_is_refused(adapter):
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="'LORA', not a Mixture of Adapters"):
        configuration(adapter)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter"):
        plan([str(tmp_path / "nothing")], [])


def test_a_base_that_nobody_names(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="name it with --base"):
        plan([str(adapter)], [])


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_written_as_in_training(name):
    tokenizer = tiny_tokenizer()
    text = chat_template(name, tokenizer)
    question = 'is "this" {odd}?\n'
    rendered = Environment().from_string(text).render(messages=[{"role": "user", "content": question}])
    prompt = prompt_of({"instruction": question}, name)
    assert rendered == prompt_text(tokenizer, prompt)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == prompt_tokens(tokenizer, prompt)


def test_what_a_tokenizer_puts_before_a_text_is_in_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    rendered = (
        Environment().from_string(chat_template("short", tokenizer)).render(messages=[{"role": "user", "content": "a"}])
    )
    assert rendered == "<s>" + prompt_text(tokenizer, prompt_of({"instruction": "a"}, "short"))


def test_a_conversation_is_refused_by_a_template_for_questions():
    text = chat_template("short", tiny_tokenizer())

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Environment()
    environment.globals["raise_exception"] = refuse
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="single questions"):
        environment.from_string(text).render(messages=messages)


def test_the_ends_of_turns_are_told_to_the_server(base, adapter):
    """Both the tokenizer's end-of-text and the base's own; the tiny base says both, so nothing has to be told."""
    assert "--override-generation-config" not in plan([str(adapter)], []).command
    (base / "generation_config.json").rename(base / "hidden.json")
    try:
        command = plan([str(adapter)], []).command
    finally:
        (base / "hidden.json").rename(base / "generation_config.json")
    assert json.loads(option(command, "--override-generation-config")) == {"eos_token_id": [2]}


def test_releases():
    check_release("0.32.0")
    check_release("0.32.1rc1")
    for version in ("0.31.2", "0.33.0"):
        with pytest.raises(ValueError, match=f"vLLM {version} has not been tried"):
            check_release(version)


def test_compiled_code_is_kept_by_configuration_and_not_by_folder(base, tmp_path):
    one, same = (configuration(saved(base, tmp_path / name)) for name in "ab")
    other = configuration(saved(base, tmp_path / "c", gating=moa.Soft()))
    assert fingerprint([one]) == fingerprint([same])
    assert fingerprint([one]) != fingerprint([other])


def test_the_verb_names_what_is_missing(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = CliRunner().invoke(app, ["serve", str(adapter), "--port", "8001"])
    assert result.exit_code == 2
    assert "moa-lm[serve]" in " ".join(result.output.split())


def test_the_verb_starts_the_server_and_says_so(adapter, monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.32.0"))
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    result = CliRunner().invoke(app, ["serve", str(adapter), "--port", "8001", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert started[0][-4:] == ["--port", "8001", "--dtype", "float32"]
    assert f"serving mine ({adapter})" in " ".join(result.output.split())


def test_the_plug_in_tells_vllm_without_importing_moa(monkeypatch):
    told: dict[str, str] = {}
    registry = types.SimpleNamespace(register_model=told.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    moa_autoload.tell_vllm()
    assert told == {"MoAForCausalLM": "moa.serving.vllm:MoAForCausalLM"}
