"""A seeded generator of small function-calling examples, with functions held out for the test."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM = "You can call one of these functions. Answer with one JSON call and nothing else.\n"

_VALUES: dict[str, list[Any]] = {
    "city": ["Oslo", "Lima", "Nairobi", "Kyoto", "Toronto", "Porto", "Cairo", "Hanoi", "Quito"],
    "person": ["Anna", "Omar", "Mei", "Lucas", "Priya", "Sofia", "Kofi", "Elena", "Tom"],
    "date": ["2024-03-14", "2024-07-01", "2025-01-20", "2025-09-09", "2026-05-30"],
    "time": ["07:30", "09:15", "12:00", "16:45", "21:10"],
    "small": [1, 2, 3, 4, 5, 6, 8],
    "number": [12, 25, 40, 64, 90, 120, 250],
    "amount": [15.5, 42.0, 99.9, 310.25, 1200.0],
    "currency": ["EUR", "USD", "JPY", "GBP", "CHF"],
    "other_currency": ["CAD", "SEK", "INR", "BRL", "AUD"],
    "language": ["French", "German", "Swahili", "Korean", "Italian"],
    "room": ["kitchen", "bedroom", "garage", "office", "hallway"],
    "word": ["bridge", "lantern", "harvest", "signal", "velvet"],
    "color": ["red", "blue", "amber", "white", "green"],
    "genre": ["jazz", "folk", "techno", "opera", "blues"],
    "animal": ["otter", "falcon", "lynx", "tapir", "heron"],
    "food": ["rice", "lentils", "salmon", "oats", "tofu"],
    "title": ["Night Train", "The Quiet Sea", "Paper Moons", "Iron Garden", "Last Orchard"],
    "company": ["Acme", "Northwind", "Bluebird", "Contoso", "Umbra"],
    "file": ["report.txt", "notes.md", "data.csv", "photo.png", "budget.xlsx"],
    "device": ["lamp", "heater", "fan", "camera", "speaker"],
    "sport": ["tennis", "hockey", "cricket", "rugby", "judo"],
    "shape": ["circle", "square", "hexagon", "triangle", "pentagon"],
    "medicine": ["aspirin", "ibuprofen", "insulin", "cetirizine", "paracetamol"],
    "element": ["iron", "neon", "copper", "helium", "zinc"],
}

# name | parameter: kind, ... | request
_FUNCTIONS = """
get_weather | city: city, date: date | What will the weather be in {city} on {date}?
convert_currency | amount: amount, source: currency, target: other_currency | \
Convert {amount} {source} to {target}.
book_table | city: city, people: small, time: time | \
Book a table for {people} in {city} at {time}.
send_message | recipient: person, text: word | Send {recipient} a message saying {text}.
set_alarm | time: time | Wake me up at {time}.
translate_word | word: word, language: language | Translate the word {word} into {language}.
play_music | genre: genre, volume: number | Play some {genre} at volume {volume}.
turn_on_device | device: device, room: room | Turn on the {device} in the {room}.
set_temperature | room: room, degrees: number | Set the {room} to {degrees} degrees.
find_flights | origin: city, date: date | Find flights from {origin} on {date}.
create_event | title: title, date: date, time: time | \
Put an event called {title} on {date} at {time} in my calendar.
get_stock_price | company: company | What does a share of {company} cost now?
buy_shares | company: company, count: number | Buy {count} shares of {company}.
search_books | title: title | Do you have the book {title}?
rate_movie | title: title, stars: small | Give the movie {title} {stars} stars.
count_calories | food: food, grams: number | How many calories are in {grams} grams of {food}?
delete_file | name: file | Delete the file {name}.
rename_file | name: file, label: word | Label the file {name} as {label}.
describe_animal | animal: animal | Tell me about the {animal}.
adopt_animal | animal: animal, name: person | I want to adopt a {animal} and name it {name}.
paint_wall | room: room, color: color | Paint the {room} wall {color}.
draw_shape | shape: shape, color: color | Draw a {color} {shape}.
compute_area | shape: shape, side: number | What is the area of a {shape} with side {side}?
schedule_match | sport: sport, date: date | Schedule a {sport} match on {date}.
get_scores | sport: sport, city: city | Show the latest {sport} scores from {city}.
remind_medicine | medicine: medicine, time: time | Remind me to take {medicine} at {time}.
check_dosage | medicine: medicine, weight: number | \
What dose of {medicine} suits someone of {weight} kilograms?
atomic_weight | element: element | What is the atomic weight of {element}?
melting_point | element: element, unit: word | \
At what temperature does {element} melt, in unit {unit}?
pay_invoice | company: company, amount: amount | Pay {company} an invoice of {amount}.
transfer_money | recipient: person, amount: amount, currency: currency | \
Transfer {amount} {currency} to {recipient}.
call_contact | name: person | Call {name}.
dim_lights | room: room, level: number | Dim the lights in the {room} to {level} percent.
lock_door | room: room | Lock the door of the {room}.
order_food | food: food, portions: small | Order {portions} portions of {food}.
get_recipe | food: food, people: small | Give me a recipe with {food} for {people} people.
spell_word | word: word | Spell the word {word}.
define_word | word: word, language: language | Define the word {word} in {language}.
find_hotel | city: city, nights: small | Find a hotel in {city} for {nights} nights.
rent_car | city: city, days: small | Rent a car in {city} for {days} days.
get_timezone | city: city | Which time zone is {city} in?
start_timer | minutes: number | Start a timer of {minutes} minutes.
log_workout | sport: sport, minutes: number | Log {minutes} minutes of {sport}.
share_file | name: file, recipient: person | Share the file {name} with {recipient}.
roll_dice | count: small | Roll {count} dice.
find_concerts | genre: genre, city: city | Find {genre} concerts in {city}.
invite_guest | name: person, date: date | Invite {name} for {date}.
compare_prices | food: food, city: city | Compare prices of {food} in {city}.
"""


@dataclass(frozen=True)
class Example:
    """One request with the functions on offer and the call that answers it."""

    function: str
    system: str
    request: str
    call: str

    def prompt(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.request},
        ]


def _parse() -> dict[str, tuple[dict[str, str], str]]:
    functions = {}
    for line in _FUNCTIONS.strip().splitlines():
        name, parameters, request = (part.strip() for part in line.split("|"))
        kinds = dict(part.strip().split(": ") for part in parameters.split(","))
        functions[name] = (kinds, request)
    return functions


_HELD_OUT = 12  # functions


def generate_examples(
    train: int, test: int, *, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Training and test examples; no function of one, not even on offer, occurs in the other."""
    functions = _parse()
    generator = random.Random(seed)
    names = sorted(functions)
    generator.shuffle(names)

    def make(pool: list[str], count: int) -> list[Example]:
        examples = []
        for i in range(count):
            name = pool[i % len(pool)]
            offered = [name, generator.choice([other for other in pool if other != name])]
            generator.shuffle(offered)
            signatures = [f"{n}({', '.join(functions[n][0])})" for n in offered]
            kinds, request = functions[name]
            values = {key: generator.choice(_VALUES[kind]) for key, kind in kinds.items()}
            call = json.dumps({"name": name, "arguments": values})
            examples.append(
                Example(name, SYSTEM + "\n".join(signatures), request.format(**values), call)
            )
        generator.shuffle(examples)
        return examples

    return make(names[_HELD_OUT:], train), make(names[:_HELD_OUT], test)


def best_constant(examples: Sequence[Example]) -> float:
    """The exact match of the one call that answers most of these requests."""
    return Counter(example.call for example in examples).most_common(1)[0][1] / len(examples)
