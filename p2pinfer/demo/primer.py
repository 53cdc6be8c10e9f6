"""Very short texts for the first steps of training: who is who, said again and again.

In a story, a name comes back only every few sentences, so that a small model needs very long to
find out that names are to be copied from earlier in the text. These texts consist of hardly
anything else. The model learns it from them within minutes, and then reads only stories.
"""

from __future__ import annotations

import random

from p2pinfer.demo.narrator import Story

SENTENCES = (
    "{Hero} is {a_kind}.",
    "{Friend} is {a_fkind}.",
    "{Hero} likes {friend}.",
    "{Friend} likes {hero}.",
    "{Hero} and {friend} are friends.",
    "{He} is called {hero}.",
    "{Fhe} is called {friend}.",
    '"Hello, {friend}," said {hero}.',
    '"Hello, {hero}," said {friend}.',
    "{Hero} has {a_thing}.",
    "The {noun} is {his} {noun}.",
    "{Friend} saw {hero} and {hero} saw {friend}.",
    "The {kind} is {hero} and the {fkind} is {friend}.",
    "{Hero} lives {at}.",
    "{Friend} went to {place} with {hero}.",
    "{Hero} told {elder}, and {elder} told {friend}.",
)
LENGTH = 9


def prime(seed: int) -> str:
    """Return the text of a seed: some of the sentences in any order, about one pair of friends."""
    story = Story(random.Random(seed))
    for sentence in story.rng.sample(SENTENCES, LENGTH):
        story.say(sentence)
    return story.text()
