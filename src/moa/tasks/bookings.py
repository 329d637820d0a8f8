"""The demonstration's task: a booking request, as a person would write it, to JSON with normalised fields.

Contract: every message states all `FIELDS` once, in words of its own; the gold answer follows from the message alone.
Days come as ISO dates, times on the 24-hour clock, durations in minutes, prices with two decimals and an ISO currency.
Surnames, days and amounts of money are split by hash, so that a test row's occur in no training row; services, times,
durations and phrases are shared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date, timedelta

from moa.tasks.core import SPLITS, Draw, Task, members
from moa.tasks.names import NAMES

FIELDS = ("name", "service", "date", "time", "minutes", "price")

INSTRUCTION = "Write this booking request as JSON."

EXPLANATION = """Write the booking request as one JSON object with exactly these keys:
"name": the customer's full name
"service": what is booked, as the customer calls it, without "a" or "an"
"date": the day as YYYY-MM-DD
"time": the start on the 24-hour clock as HH:MM
"minutes": how long it takes, as a number of minutes
"price": the price with two decimals and the currency EUR, USD or GBP
Answer with the JSON object alone."""
"""What a model needs to be told that has not been trained on the task; `INSTRUCTION` is enough for one that has."""

_SURNAMES = (  # noqa: SIM905
    "Abbott Adler Archer Bailey Barnes Becker Bishop Brandt Brooks Burton Carter Chapman Clarke Cooper Cross Dalton "
    "Dawson Doyle Duncan Eaton Ellis Fischer Fleming Foster Fuller Garner Gibson Grant Griffin Hale Harper Hayes Holt "
    "Hughes Hunter Ingram Jensen Keller Kemp Knight Lambert Lang Larsen Lawson Lehmann Lowe Marsh Mason Meyer Mills "
    "Morgan Murphy Nash Newton Nolan Novak Oakley Olsen Osborne Palmer Parker Perry Porter Price Quinn Ramsey Reed "
    "Rhodes Richter Rossi Rowe Sanders Schmidt Sharp Silva Slater Sparks Steele Stone Sutton Tanner Tate Thorne Tucker "
    "Turner Vance Vogel Wagner Walsh Warner Weaver Webb Weiss Wells Winter Wright Yates York Zeller Ziegler"
).split()
_SERVICES = (  # noqa: SIM905
    "a haircut|a dental check-up|a piano lesson|a guitar lesson|an eye test|a back massage|a car inspection|"
    "a bike repair|a yoga class|a photo shoot|a boiler service|a piano tuning|a driving lesson|a tax consultation|"
    "a dog grooming|a swimming lesson|a window cleaning|a garden consultation|a hearing test|a singing lesson|"
    "a physiotherapy session|a wine tasting|a pottery class|a manicure|a cooking class|a chess lesson|"
    "an oil change|a tattoo session|a studio tour|a horse ride"
).split("|")
_MONTHS = (  # noqa: SIM905
    "January February March April May June July August September October November December"
).split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
_ONES = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_DAYS = [date(2026, 1, 1) + timedelta(days=number) for number in range(2 * 365)]
_AMOUNTS = [*range(12, 100), *range(100, 400, 5)]
_CURRENCIES = {"EUR": ("euros", "€"), "USD": ("dollars", "$"), "GBP": ("pounds", "£")}
_DURATIONS = {
    15: ("a quarter of an hour", "15 minutes"),
    20: ("twenty minutes", "20 minutes"),
    30: ("half an hour", "30 minutes"),
    45: ("three quarters of an hour", "45 minutes"),
    60: ("an hour", "one hour"),
    90: ("an hour and a half", "90 minutes"),
    120: ("two hours", "2 hours"),
}

_REQUESTS = (
    "I would like to book {service} on {day} at {time}.",
    "Could you fit me in for {service} at {time} on {day}?",
    "I need {service}, if possible on {day}. I could come at {time}.",
    "Is there a free slot for {service} on {day}, {time}?",
    "Please put me down for {service} at {time}. The day would be {day}.",
    "Can I have {service} on {day}? I would be there at {time}.",
)
_LENGTHS = (
    "It should take {duration}.",
    "Please plan {duration} for it.",
    "I have {duration} for this.",
    "We said it lasts {duration}.",
)
_PRICES = (
    "You quoted me {price}.",
    "The price we agreed on is {price}.",
    "I was told that it costs {price}.",
    "I will bring {price} with me.",
)
_ASIDES = (
    "I was last with you in 2024.",
    "You can call me at 555 0{number}.",
    "A friend recommended you.",
    "I will come by bus number {number}.",
    "My flat is number {number}, by the way.",
    "Please let me know if that works.",
)
_OPENINGS = ("Hello, this is {name}.", "Hi, {name} here.", "My name is {name}.", "Good morning, I am {name}.")
_GREETINGS = ("Hello.", "Good morning.", "Hi.")
_CLOSINGS = ("Thanks, {name}", "Best wishes, {name}", "Regards, {name}", "Many thanks, {name}")


def spelt(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def _day(rng: random.Random, day: date) -> str:
    month, number = _MONTHS[day.month - 1], day.day
    suffix = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    ordinal = f"{number}{suffix}"
    return rng.choice(
        (
            f"{number} {month} {day.year}",
            f"{month} {ordinal}, {day.year}",
            f"the {ordinal} of {month} {day.year}",
            f"{number} {month[:3]} {day.year}",
            f"{number:02}.{day.month:02}.{day.year}",
            f"{_WEEKDAYS[day.weekday()]}, {number} {month} {day.year}",
        )
    )


def _time(rng: random.Random, hour: int, minute: int) -> str:
    twelve, part = (hour - 1) % 12 + 1, "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    half = "am" if hour < 12 else "pm"
    said, next_said = spelt(twelve), spelt(twelve % 12 + 1)
    words = {0: f"{said} o'clock", 15: f"quarter past {said}", 30: f"half past {said}", 45: f"quarter to {next_said}"}
    return rng.choice(
        (
            f"{twelve}:{minute:02} {half}" if minute else f"{twelve} {half}",
            f"{words[minute]} in the {part}",
            f"{hour}:{minute:02}",
        )
    )


def _price(rng: random.Random, amount: int, cents: int, currency: str) -> str:
    word, sign = _CURRENCIES[currency]
    if cents:
        return rng.choice((f"{amount}.{cents} {word}", f"{sign}{amount}.{cents}"))
    forms = [f"{amount} {word}", f"{sign}{amount}"]
    return rng.choice([*forms, f"{spelt(amount)} {word}"] if amount < 100 else forms)


def _message(rng: random.Random, name: str, parts: Sequence[str]) -> str:
    """The sentences in an order that people use: who, what, then the rest in any order, signed or introduced."""
    request, *rest = parts
    rng.shuffle(rest)
    if rng.random() < 0.5:
        return " ".join((rng.choice(_OPENINGS).format(name=name), request, *rest))
    return " ".join((rng.choice(_GREETINGS), request, *rest, rng.choice(_CLOSINGS).format(name=name)))


def booking(rng: random.Random, split: str) -> Draw:
    """One booking request and its JSON."""
    name = f"{rng.choice(NAMES)} {rng.choice(_SURNAMES_OF[split])}"
    service, day, amount = rng.choice(_SERVICES), rng.choice(_DAYS_OF[split]), rng.choice(_AMOUNTS_OF[split])
    hour, minute, minutes = rng.randint(8, 19), rng.choice((0, 15, 30, 45)), rng.choice(list(_DURATIONS))
    cents, currency = rng.choice((0, 0, 50, 90)), rng.choice(list(_CURRENCIES))
    request = rng.choice(_REQUESTS).format(service=service, day=_day(rng, day), time=_time(rng, hour, minute))
    rest = [
        rng.choice(_LENGTHS).format(duration=rng.choice(_DURATIONS[minutes])),
        rng.choice(_PRICES).format(price=_price(rng, amount, cents, currency)),
    ]
    if rng.random() < 0.5:
        rest.append(rng.choice(_ASIDES).format(number=rng.randint(2, 199)))
    values = (
        name,
        service.partition(" ")[2],
        day.isoformat(),
        f"{hour:02}:{minute:02}",
        minutes,
        f"{amount}.{cents:02} {currency}",
    )
    answer = json.dumps(dict(zip(FIELDS, values, strict=True)))
    message = _message(rng, name, [request, *rest])
    return Draw(key=day.isoformat(), instruction=f"{INSTRUCTION}\n\n{message}", output=answer, answer=answer)


_SURNAMES_OF = {split: members(_SURNAMES, split, str) for split in SPLITS}
_DAYS_OF = {split: members(_DAYS, split, date.isoformat) for split in SPLITS}
_AMOUNTS_OF = {split: members(_AMOUNTS, split, str) for split in SPLITS}

BOOKINGS = Task("bookings", "extraction", "json", 0.0, booking, answer_tokens=96)
