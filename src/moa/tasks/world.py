"""The closed world of the bundled commonsense tasks: everyday facts as plain tables.

Contract: `FACTS` is a fixed tuple of `Fact`; every fact is a (relation, subject, object) triple with a
statement in plain English, and `OBJECTS[relation]` are the objects that occur; `WRONG[fact]` are those
that would make a false statement. The embedded base model read every one of these statements in
pretraining; the tasks split them between train and test, so a tuned model can only answer test
questions from pretrained knowledge.

Limits: about 450 facts in seven relations, one object per subject: the usual one (roses are red,
tables are made of wood). It is a toy world to measure fine-tuning with, not a knowledge base.
"""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES: dict[str, str] = {
    "animal": "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse monkey camel zebra "
    "elephant donkey deer",
    "bird": "eagle owl duck goose hen swan crow parrot robin pigeon sparrow penguin ostrich hawk",
    "fish": "salmon tuna trout shark cod eel herring carp",
    "insect": "ant bee fly wasp beetle moth butterfly cricket",
    "fruit": "apple pear banana orange lemon plum peach cherry grape melon mango lime fig strawberry",
    "vegetable": "carrot potato onion cabbage pea bean turnip pumpkin spinach leek radish lettuce",
    "tool": "hammer saw drill axe spade rake wrench chisel shovel screwdriver",
    "garment": "shirt coat hat scarf sock glove skirt dress jacket sweater apron cap",
    "vehicle": "car bus train truck bicycle boat ship plane tractor van taxi wagon",
    "piece of furniture": "chair table bed desk sofa shelf bench cupboard stool wardrobe",
    "musical instrument": "piano violin drum flute guitar trumpet harp cello organ banjo",
    "drink": "tea coffee milk juice water beer wine cocoa lemonade cider",
    "colour": "red blue green yellow white black brown pink purple grey",
    "shape": "circle square triangle cube sphere star oval cone",
    "part of the body": "arm leg nose ear eye mouth foot hand knee elbow neck finger",
    "flower": "rose tulip daisy lily violet poppy daffodil sunflower",
    "tree": "oak pine elm birch maple willow palm cedar",
    "metal": "gold silver iron copper tin lead steel zinc",
    "building": "church school castle barn hotel factory hospital prison palace temple",
    "job": "doctor teacher farmer baker nurse sailor soldier judge tailor butcher cook lawyer",
}

CAPITALS = (
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin England:London Ireland:Dublin Greece:Athens "
    "Portugal:Lisbon Austria:Vienna Russia:Moscow Poland:Warsaw Norway:Oslo Sweden:Stockholm "
    "Denmark:Copenhagen Egypt:Cairo Kenya:Nairobi Japan:Tokyo China:Beijing Cuba:Havana Peru:Lima "
    "Chile:Santiago Canada:Ottawa Hungary:Budapest Belgium:Brussels Ghana:Accra Iran:Tehran "
    "Iraq:Baghdad Turkey:Ankara Finland:Helsinki Scotland:Edinburgh Wales:Cardiff Thailand:Bangkok"
)

OPPOSITES = (
    "hot:cold big:small tall:short fast:slow old:young wet:dry hard:soft full:empty rich:poor "
    "happy:sad light:dark early:late open:closed clean:dirty strong:weak high:low near:far "
    "loud:quiet thick:thin wide:narrow heavy:light sweet:sour new:old good:bad right:wrong "
    "left:right up:down day:night black:white first:last begin:end buy:sell push:pull win:lose "
    "laugh:cry come:go give:take true:false smooth:rough sharp:blunt deep:shallow brave:afraid"
)

COLOURS = (
    "grass:green snow:white blood:red coal:black banana:yellow lemon:yellow tomato:red carrot:orange "
    "pumpkin:orange milk:white chocolate:brown crow:black swan:white sky:blue sea:blue leaf:green "
    "sun:yellow cucumber:green frog:green rose:red elephant:grey mouse:grey bear:brown salt:white "
    "sugar:white butter:yellow lettuce:green cherry:red strawberry:red spinach:green night:black "
    "cloud:white pea:green soil:brown corn:yellow straw:yellow smoke:grey pig:pink lime:green "
    "violet:purple plum:purple ink:black"
)

MATERIALS = (
    "window:glass bottle:glass mirror:glass nail:iron anvil:iron chain:iron book:paper newspaper:paper "
    "letter:paper shoe:leather saddle:leather belt:leather boot:leather table:wood chair:wood door:wood "
    "fence:wood barrel:wood sweater:wool scarf:wool blanket:wool sock:wool wall:stone castle:stone "
    "statue:stone bridge:stone coin:metal key:metal spoon:metal knife:metal tyre:rubber ball:rubber "
    "eraser:rubber cup:clay pot:clay brick:clay tile:clay shirt:cotton towel:cotton sheet:cotton"
)

HOMES = (
    "fish:the water whale:the water shark:the water crab:the water salmon:the water bird:a nest "
    "robin:a nest eagle:a nest bee:a hive wasp:a hive cow:a barn horse:a stable donkey:a stable "
    "camel:the desert lion:the grassland zebra:the grassland elephant:the grassland monkey:the forest "
    "bear:the forest deer:the forest owl:the forest spider:a web rabbit:a hole fox:a hole mole:a hole "
    "mouse:a hole penguin:the ice seal:the ice hen:a barn pig:a barn king:a palace "
    "queen:a palace monk:a church priest:a church prisoner:a prison"
)

USES = (
    "hammer:hit a nail saw:cut wood axe:chop wood knife:cut bread scissors:cut paper needle:sew cloth "
    "thread:sew cloth broom:sweep the floor brush:sweep the floor pen:write a letter pencil:write a letter "
    "spade:dig a hole shovel:dig a hole key:open a door oven:bake bread kettle:boil water pot:cook soup "
    "pan:fry an egg towel:dry your hands soap:wash your hands clock:tell the time watch:tell the time "
    "map:find the way compass:find the way lamp:light a room candle:light a room bed:sleep at night "
    "pillow:sleep at night umbrella:keep off the rain raincoat:keep off the rain ladder:climb a wall "
    "rope:tie a boat ruler:measure a line tape:measure a line net:catch fish hook:catch fish "
    "bucket:carry water jug:carry water phone:call a friend stove:cook soup"
)

_UNCOUNTED_WORDS = (
    "grass snow blood coal milk chocolate sky sea sun salt sugar butter night soil corn straw smoke ink "
    "tea coffee juice water beer wine cocoa lemonade cider gold silver iron copper tin lead steel zinc "
    "red blue green yellow white black brown pink purple grey lettuce spinach scissors thread soap tape "
    "cod salmon tuna trout herring cabbage"
)
_UNCOUNTED = frozenset(_UNCOUNTED_WORDS.split())
_DEFINITE = {"sky", "sea", "sun", "night"}


def noun(word: str) -> str:
    """The word as it stands in a sentence: with "a", "an", "the", or bare where it is not counted."""
    if word in _DEFINITE:
        return f"the {word}"
    if word in _UNCOUNTED:
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def sentence(text: str) -> str:
    """The text with its first letter in upper case; the rest, names included, is left alone."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Fact:
    """One true statement: `relation(subject) = object`."""

    relation: str
    subject: str
    object: str

    def say(self, obj: str | None = None) -> str:
        """The fact as a clause without capital or full stop; another object makes it a false one."""
        return clause(self.relation, self.subject, obj or self.object)


def clause(relation: str, subject: str, obj: str) -> str:
    """One plain clause for the triple, e.g. `a pear is a fruit`."""
    verb = "are" if subject == "scissors" else "is"
    match relation:
        case "kind":
            return f"{noun(subject)} {verb} {noun(obj)}"
        case "capital":
            return f"the capital of {subject} is {obj}"
        case "opposite":
            return f"the opposite of {subject} is {obj}"
        case "colour":
            return f"{noun(subject)} {verb} {obj}"
        case "material":
            return f"{noun(subject)} is made of {obj}"
        case "home":
            return f"{noun(subject)} lives in {obj}"
        case "use":
            return f"you use {noun(subject)} to {obj}"
    raise ValueError(f"unknown relation {relation!r}")


def _pairs(table: str) -> list[tuple[str, str]]:
    """`a:b c:d e f:g h` -> pairs; an object may hold spaces, a subject may not."""
    chunks = table.split(":")
    pairs, subject = [], chunks[0]
    for chunk in chunks[1:-1]:
        obj, _, following = chunk.rpartition(" ")
        pairs.append((subject, obj))
        subject = following
    return [*pairs, (subject, chunks[-1])]


def _facts() -> tuple[Fact, ...]:
    facts = [Fact("kind", s, kind) for kind, names in CATEGORIES.items() for s in names.split()]
    for relation, table in (
        ("capital", CAPITALS),
        ("opposite", OPPOSITES),
        ("colour", COLOURS),
        ("material", MATERIALS),
        ("home", HOMES),
        ("use", USES),
    ):
        facts += [Fact(relation, subject, obj) for subject, obj in _pairs(table)]
    return tuple(facts)


# Objects that would be true, or arguably true, beside the one in the table.
_WILD = ("the forest", "the grassland", "a hole", "a barn", "a stable")
_COLOUR_NAMES = frozenset(("violet", "rose", "peach", "plum", "lime", "cherry", "gold", "silver", "copper", "lemon"))


def _arguable(fact: Fact) -> set[str]:
    """Objects that a wrong statement about the fact's subject had better not use."""
    match fact.relation:
        case "kind":
            animal = {"animal"} if fact.object in ("bird", "fish", "insect") else set()
            return animal | ({"colour"} if fact.subject in _COLOUR_NAMES else set())
        case "material":
            return {"metal", "iron"} if fact.object in ("metal", "iron") else set()
        case "home":
            return {*_WILD, "the water"} if fact.object == "the ice" else set(_WILD)
    return set()


def _wrong_objects() -> dict[Fact, tuple[str, ...]]:
    """For every fact the objects of its relation that its subject clearly does not have."""
    true: dict[str, set[str]] = {}
    for fact in FACTS:
        true.setdefault(fact.subject, set()).add(fact.object)
    return {
        fact: tuple(o for o in OBJECTS[fact.relation] if o not in true[fact.subject] | _arguable(fact))
        for fact in FACTS
    }


FACTS: tuple[Fact, ...] = _facts()
OBJECTS: dict[str, tuple[str, ...]] = {
    relation: tuple(sorted({f.object for f in FACTS if f.relation == relation}))
    for relation in ("kind", "capital", "opposite", "colour", "material", "home", "use")
}
WRONG: dict[Fact, tuple[str, ...]] = _wrong_objects()
