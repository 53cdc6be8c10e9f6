"""The narrator of the demo stories: it holds the cast of one story and collects its sentences."""

from __future__ import annotations

import random
from dataclasses import dataclass

from p2pinfer.demo import words


@dataclass(frozen=True)
class Character:
    """Someone in a story: the name, the kind (girl, fox, ...) and whether to say she or he."""

    name: str
    kind: str
    female: bool

    @property
    def is_child(self) -> bool:
        """Whether this character is a child rather than an animal."""
        return self.kind in ("girl", "boy")


def with_article(noun: str) -> str:
    """Put the fitting indefinite article before a noun phrase."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pronouns(character: Character, prefix: str) -> dict[str, str]:
    """Name the pronouns of a character for the templates, in both cases of the first letter."""
    forms = (
        ("she", "her", "her", "herself") if character.female else ("he", "him", "his", "himself")
    )
    keys = ("he", "him", "his", "himself")
    fields = {prefix + key: form for key, form in zip(keys, forms, strict=True)}
    fields[prefix + "kind"] = character.kind
    fields[f"a_{prefix}kind"] = with_article(character.kind)
    return fields


class Story:
    """One story being told: it holds the cast and collects sentences into paragraphs."""

    def __init__(self, rng: random.Random) -> None:
        """Draw the cast, the scene and the things that the whole story refers back to."""
        self.rng = rng
        self.paragraphs: list[list[str]] = [[]]
        self.hero = self._character(None)
        self.friend = self._character(self.hero)
        self.fields: dict[str, str] = {}
        self._set_cast()
        self._set_scene()

    def _character(self, other: Character | None) -> Character:
        """Draw a character; a friend differs from the hero in name, kind and gender."""
        female = self.rng.random() < 0.5
        if other is not None:
            female = not other.female
        if self.rng.random() < (0.5 if other is None else 0.45):
            names = words.GIRLS if female else words.BOYS
            return Character(self.rng.choice(names), "girl" if female else "boy", female)
        kinds = [kind for kind in words.ANIMALS if other is None or kind != other.kind]
        names = words.SHE_ANIMALS if female else words.HE_ANIMALS
        return Character(self.rng.choice(names), self.rng.choice(kinds), female)

    def _set_cast(self) -> None:
        """Fill in the fields that speak of the hero and of the friend."""
        for character, key, prefix in ((self.hero, "hero", ""), (self.friend, "friend", "f")):
            self.put(key, character.name)
            self.put("the" + key, "the " + character.kind)
            for name, value in pronouns(character, prefix).items():
                self.put(name, value)
        trait, other_trait = self.rng.sample(words.TRAITS, 2)
        self.put("a_trait", with_article(trait))
        self.put("trait", trait)
        self.put("a_ftrait", with_article(other_trait))
        elder, elder_he = self.rng.choice(words.ELDERS)
        self.put("elder", elder)
        self.put("ehe", elder_he)

    def _set_scene(self) -> None:
        """Fill in the fields for places, weather, things and small details."""
        rng = self.rng
        (at, place), (at2, place2) = rng.sample(words.PLACES, 2)
        self.put("at", at)
        self.put("place", place)
        self.put("at2", at2)
        self.put("place2", place2)
        noun, other_noun = rng.sample(words.THINGS, 2)
        colour, other_colour = rng.sample(words.COLOURS, 2)
        self.put("noun", noun)
        self.put("thing", f"{colour} {noun}")
        self.put("a_thing", with_article(f"{colour} {noun}"))
        self.put("a_gift", with_article(f"{other_colour} {other_noun}"))
        self.put("gift", other_noun)
        weather = rng.choice(words.WEATHER)
        self.put("weather", weather)
        self.put("a_weather", with_article(weather))
        self.put("time", rng.choice(words.TIMES))
        self.put("hobby", rng.choice(words.HOBBIES))
        self.put("snack", rng.choice(words.SNACKS))
        self.put("spot", rng.choice(words.SPOTS))
        self.put("sky", rng.choice(words.SKIES))

    def put(self, key: str, value: str) -> None:
        """Define a field for the templates, and its form at the start of a sentence."""
        self.fields[key] = value
        self.fields[key[0].upper() + key[1:]] = value[0].upper() + value[1:]

    def say(self, *variants: str) -> None:
        """Add one of the variants, with the fields filled in."""
        self.paragraphs[-1].append(self.rng.choice(variants).format_map(self.fields))

    def maybe(self, *variants: str, chance: float = 0.5) -> None:
        """Add one of the variants, or nothing at all."""
        if self.rng.random() < chance:
            self.say(*variants)

    def paragraph(self) -> None:
        """Begin a new paragraph."""
        self.paragraphs.append([])

    def text(self) -> str:
        """Return the whole story."""
        return "\n\n".join(" ".join(sentences) for sentences in self.paragraphs if sentences)
