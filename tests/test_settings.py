"""Settings files of all kinds: one way to read, check, document and describe them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moa.cli import app
from moa.cli.keys import KINDS, class_of, flags
from moa.cli.options import Template
from moa.data import TEMPLATE_NAMES, TEMPLATES
from moa.recipes import find, names
from moa.settings import Several, describe, knob, load, read, save, schema, settings
from moa.studies.study import Study
from moa.training.recipe import Recipe

STUDIES = Path(__file__).parent.parent / "benchmarks" / "studies"
METHODS = {"methods": {"soft-moa": None}, "budgets": [1000]}


@settings
class Oven:
    """A section."""

    degrees: int = knob(180, "of Celsius", gt=0, le=300)
    fan: bool = knob(False, "whether it blows")


@settings
class Cake:
    """A file."""

    name: str = knob("sponge", "of the cake")
    eggs: Several[int] = knob(lambda: [3], "in each batch")
    oven: Oven = knob(Oven, "how it is baked")

    def __post_init__(self) -> None:
        if self.name == "stone":
            raise ValueError("name='stone' cannot be baked")


def cake(folder: Path, text: str, **flags: str | list[str]) -> Cake:
    file = folder / "cake.yaml"
    file.write_text(text)
    return load(Cake, file, {key.replace("__", "."): value for key, value in flags.items()})


def test_flags_win_and_one_value_is_a_list_of_one(tmp_path):
    made = cake(tmp_path, "eggs: 2\noven: {degrees: 1e2}", name="2048", oven__fan="true")
    assert (made.name, made.eggs, made.oven.degrees, made.oven.fan) == ("2048", [2], 100, True)
    assert cake(tmp_path, "", eggs=["1", "2"]).eggs == [1, 2]
    assert cake(tmp_path, "oven:\n", oven__degrees="7").oven.degrees == 7


@pytest.mark.parametrize("text", ["1.10", "010", "1_000", "1:30", "1e3", "2024-11-30", "no", "~x"])
def test_a_flag_of_text_is_taken_as_it_is_written(tmp_path, text):
    assert cake(tmp_path, "", name=text).name == text


@pytest.mark.parametrize("text", ["name: a\neggs: 2\nname: b", "oven: {degrees: 1, fan: true, degrees: 2}"])
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"the key '(name|degrees)' is there twice.*line"):
        cake(tmp_path, text)


def test_what_is_saved_is_read_again(tmp_path):
    made = Cake(name="süß", eggs=[1], oven=Oven(degrees=7))
    save(made, tmp_path / "deep" / "cake.yaml")
    assert load(Cake, tmp_path / "deep" / "cake.yaml") == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eggz: 1", r"the file has no key 'eggz' \(did you mean 'eggs'\?\); its keys are \['name', 'eggs', 'oven'\]"),
        ("oven: {fann: true}", "oven has no key 'fann'"),
        ("oven: 3", "oven must be a mapping of keys to values, not 3"),
        ("oven: {degrees: 301}", "oven.degrees=301 is outside of its range: at most 300"),
        ("oven: {degrees: 0}", "oven.degrees=0 is outside of its range: above 0"),
        ("oven: {degrees: true}", "oven.degrees=True must be a whole number"),
        ("oven: {degrees: hot}", "oven.degrees='hot' must be a whole number"),
        ("oven: {degrees: .nan}", "oven.degrees=nan must be a whole number"),
        ("oven: {fan: 1}", "oven.fan=1 must be true or false"),
        ("eggs: [1, x]", r"eggs\[1\]='x' must be a whole number"),
        ("name: [a]", r"name=\['a'\] must be text"),
        ("name: stone", "cake.yaml: name='stone' cannot be baked"),
        ("1: 2", "the file has no key '1'"),
        ("[1]", r"the file must be a mapping of keys to values, not \[1\]"),
        ("a: [", "cake.yaml: not YAML"),
        ("[" * 5000, "cake.yaml: not YAML"),
        ("a: !!timestamp x", "cake.yaml: not YAML"),
        ("a: " + "{b: " * 50 + "1" + "}" * 50, "nested deeper than 40 levels"),
        ("a: &a [*a]", "nested deeper than 40 levels"),
        (
            "a0: &a0 [x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
            "more than 100,000 values",
        ),
        ("a: !!python/object/apply:os.getpid []", "cake.yaml: not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        cake(tmp_path, text)
    assert str(caught.value).startswith("cake.yaml: ")
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("target", ["/dev/zero", "cake.yaml"])
def test_what_is_no_ordinary_file_is_not_read(tmp_path, target):
    (tmp_path / "cake.yaml").symlink_to(target)
    with pytest.raises((ValueError, FileNotFoundError), match=r"cake\.yaml"):
        load(Cake, tmp_path / "cake.yaml")


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)degrees.*eggz"):
        cake(tmp_path, "eggz: 1\noven: {degrees: -1}")


def test_a_flag_into_what_is_no_section(tmp_path):
    with pytest.raises(ValueError, match=r"--name\.first: 'name' is not a section"):
        cake(tmp_path, "name: 3", name__first="a")


def test_flags_of_a_command_line(capsys):
    assert flags(["--a.b", "1", "--c=2", "--d-e", "3", "4"]) == {"a.b": "1", "c": "2", "d-e": ["3", "4"]}
    assert flags(["--a", "1", "2", "--a", "3"]) == {"a": "3"}
    assert "--a is given twice: the last one counts, 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unexpected argument 'a'"):
        flags(["a"])
    with pytest.raises(ValueError, match="--a needs a value"):
        flags(["--a", "--b", "1"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_documented_in_help_and_schema(kind):
    assert all(doc not in ("", "None") for _, _, doc in describe(class_of(kind)))
    described = schema(class_of(kind))
    assert described["additionalProperties"] is False
    documented = [key for key, entry in described["properties"].items() if "description" in entry or "$ref" in entry]
    assert documented == list(described["properties"])


@pytest.mark.parametrize("kind", ["recipe", "spans", "study"])
def test_moa_schema_prints_json(kind):
    result = CliRunner().invoke(app, ["schema", kind])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["type"] == "object"


FILES = [
    *((kind, find(name, kind)) for kind in ("recipe", "span recipe") for name in names(kind)),
    *(("study", file) for file in sorted(STUDIES.glob("*.yaml"))),
]


@pytest.mark.parametrize(("kind", "file"), FILES, ids=[file.stem for _, file in FILES])
def test_the_schema_allows_what_ships(kind, file):
    """By hand, since no validator of JSON Schema is among the requirements: keys and types, sections included."""
    whole = schema(class_of(kind))
    check(read(file), whole, whole["$defs"])


def check(value: object, allowed: dict, definitions: dict) -> None:
    allowed = definitions[allowed["$ref"].rpartition("/")[2]] if "$ref" in allowed else allowed
    options = allowed.get("anyOf", [allowed])
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    fitting = [
        one for one in options if one.get("type") == "null" or "$ref" in one or isinstance(value, kinds[one["type"]])
    ]
    assert fitting or value is None, (value, allowed)
    if isinstance(value, dict) and "properties" in allowed:
        assert value.keys() <= allowed["properties"].keys()
        for key, inner in value.items():
            check(inner, allowed["properties"][key], definitions)


def test_names_of_templates_are_the_same_everywhere():
    assert set(TEMPLATE_NAMES) == {*TEMPLATES, "chat"} == {member.value for member in Template}


def test_settings_made_in_code_are_checked_as_files_are():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        Recipe(schedule="cosin")
    with pytest.raises(ValueError, match="data has no key 'trian'"):
        Recipe(data={"trian": "x"})
    with pytest.raises(ValueError, match="steps=1 is outside of its range: at least 2"):
        Study(**METHODS, steps=1)
    assert yaml.safe_load(find("embedded-soft-moa").read_text())["base"] == Recipe.load("embedded-soft-moa").base
